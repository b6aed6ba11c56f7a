# docker build -t speedrun . && docker run --gpus all --shm-size=8g -v "$(pwd)":/workspace speedrun
# The development image holds ptxas and the headers that Triton and torch.compile use on a new machine.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv git \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home runner && install --directory --owner=runner /opt/venv /workspace
USER runner
COPY requirements.txt /tmp/requirements.txt
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir --requirement /tmp/requirements.txt
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /workspace
CMD ["./run.sh"]
