# docker build --tag speedrun .
# docker run --gpus all --shm-size=8g --user "$(id -u):$(id -g)" -v "$(pwd)":/workspace speedrun
# For NVIDIA GPU machines. The image holds the packages; the code, the data and the logs are in the mounted folder.
# To build from the very same bytes every time, append the digest (docker buildx imagetools inspect NAME:TAG) to the tag.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# torch.compile and Triton compile on the machine: they call the C++ compiler and read Python's headers.
# Versions are Ubuntu 24.04's: its mirrors drop older ones, so a pinned one would soon not be found.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

COPY requirements-common.txt requirements-gpu.txt requirements-hopper.txt /tmp/
# run.sh adds requirements-hopper.txt only to a .venv of its own, so the image brings both
RUN python3.12 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --requirement /tmp/requirements-gpu.txt \
       --requirement /tmp/requirements-hopper.txt

# Any user may run it: caches go to /tmp, and their names to USER, since an id given with --user has no name here
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp USER=runner
USER 1000:1000
WORKDIR /workspace
CMD ["./run.sh"]
