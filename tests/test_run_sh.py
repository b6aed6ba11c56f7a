"""run.sh and tools/environment.sh with stand-ins for Python and nvidia-smi: what they start, and what they say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDIN = """#!/bin/sh
echo "$@" | tr '\\n' ' ' >> "{calls}"; echo >> "{calls}"
case "$*" in
  *device_count*) {probe} ;;
  *) {rest} ;;
esac
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the scripts; its bin/ comes first on the PATH, and no variable chooses GPUs."""
    for name in ("run.sh", "test.sh", "tools/environment.sh", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return tmp_path


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def standin(place, probe="exit 4", rest="true", path="bin/python3"):
    """A Python that notes its arguments: `probe` is what it does when asked what it can do, `rest` otherwise."""
    program(place / path, STANDIN.format(calls=place / "calls", probe=probe, rest=rest))


def has_gpu(place):
    program(place / "bin" / "nvidia-smi", '#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA H100"\nexit 0\n')


def run(place, *args, script="run.sh"):
    """The script's status, lines, and what it started Python with, shortened to a word or two."""
    done = subprocess.run([place / script, *args], cwd=place, capture_output=True, text=True, timeout=60)
    calls = (place / "calls").read_text().splitlines() if (place / "calls").exists() else []
    calls = ["probe" if "device_count" in call else call for call in calls]
    return done.returncode, (done.stdout + done.stderr).splitlines(), calls


@pytest.mark.parametrize("gpus, ranks", [(1, 1), (3, 2), (8, 8), (11, 8)])
def test_starts_with_gpus(place, gpus, ranks):
    """Three starts of Python before the ranks: what is there, the download, all checks."""
    standin(place, f"echo {gpus} 0")
    status, lines, calls = run(place, "--seed=1")
    assert (status, lines) == (0, [])
    assert calls == ["probe", "data/cached_fineweb10B.py 9 ", "tools/doctor.py --quick --quiet --check --seed=1 ",
                     f"tools/launch.py --standalone --nproc_per_node={ranks} train_gpt.py --seed=1 "]


@pytest.mark.parametrize("args", [["--train_files=x*.bin"], ["--preset=demo"], ["--preset", "demo"]])
def test_other_data_is_not_downloaded(place, args):
    standin(place, "echo 1 0")
    calls = run(place, *args, "--log_dir=l")[2]
    assert [call.split()[0] for call in calls] == ["probe", "tools/doctor.py", "tools/launch.py"]


def test_starts_without_a_gpu(place, monkeypatch):
    """The real Python: one start to look, one that runs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    real = f'exec "{sys.executable}" "$@"'
    standin(place, real, f'[ "$1" = train_gpt.py ] || {real}')
    status, lines, calls = run(place, "--log_dir=l")
    assert status == 0 and lines == ["No NVIDIA GPU here: running the CPU demo on the bundled sample."]
    assert calls == ["probe", "train_gpt.py --preset=demo --log_dir=l "]
    standin(place, "echo 0 0 0")
    assert run(place, "--help")[2][2:] == ["probe", "train_gpt.py --help "]


@pytest.mark.parametrize("failing, left", [("*cached*", 2), ("*doctor*", 3)])
def test_a_failure_ends_it(place, failing, left):
    standin(place, "echo 2 0", f'case "$*" in {failing}) echo "error: no" >&2; exit 1;; esac')
    status, lines, calls = run(place)
    assert status == 1 and lines == ["error: no"] and len(calls) == left


@pytest.mark.parametrize("visible, status, said", [
    (None, 1, "error: why"), ("", 0, "CUDA_VISIBLE_DEVICES hides them: running the CPU demo"),
    ("-1", 0, "CUDA_VISIBLE_DEVICES hides them"), ("7", 1, "error: why")])
def test_gpu_that_torch_does_not_see(place, monkeypatch, visible, status, said):
    """A hidden GPU means the demo; otherwise tools/no_gpu.py has the last word."""
    has_gpu(place)
    standin(place, "echo 0 0", 'case "$*" in *no_gpu*) echo "error: why" >&2; exit 1;; esac')
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found, lines, calls = run(place, "--seed=1")
    assert found == status and len(lines) == 1 and said in lines[0] and lines[0].startswith("error: ") == bool(status)
    assert calls[1:] == ["tools/no_gpu.py " if status else "train_gpt.py --preset=demo --seed=1 "]


def test_hopper_packages_only_for_its_own_environment(place):
    """requirements-hopper.txt goes into .venv where it helps; a failure is a warning."""
    for probe, path, installs in (("1 1", ".venv/bin/python", 1), ("1 0", ".venv/bin/python", 0),
                                  ("1 1", "bin/python3", 0)):
        shutil.rmtree(place / ".venv", ignore_errors=True)
        (place / "calls").unlink(missing_ok=True)
        standin(place, f"echo {probe}", 'case "$*" in *requirements-hopper*) exit 1;; esac', path)
        status, lines, calls = run(place)
        assert status == 0 and sum("requirements-hopper.txt" in call for call in calls) == installs
        assert len(lines) == installs and all(line.startswith("warning: requirements-hopper.txt") for line in lines)


@pytest.mark.parametrize("generation, cuda, modules, found", [
    (9, "13.0", [], "1 1"), (9, "13.0", ["flash_attn"], "1 1"), (9, "13.0", ["flash_attn", "quack"], "1 0"),
    (9, "12.6", [], "1 0"), (10, "13.0", [], "1 0"), (9, None, [], "1 0")])
def test_probe_on_gpus(place, generation, cuda, modules, found):
    """The packages for Hopper are wanted where they fit GPU and torch. -S: none of this machine's packages."""
    (place / "lib").mkdir()
    (place / "lib" / "torch.py").write_text(
        "class cuda:\n    device_count = lambda: 1\n"
        f"    get_device_capability = lambda: ({generation}, 0)\nclass version:\n    cuda = {cuda!r}\n")
    for name in modules:
        (place / "lib" / f"{name}.py").touch()
    program(place / "bin" / "python3", f'#!/bin/sh\nPYTHONPATH="{place}/lib" exec "{sys.executable}" -S "$@"\n')
    (place / "lib" / "torch-2.11.0.dist-info").mkdir()
    (place / "lib" / "torch-2.11.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.11.0\n")
    script = ("source tools/environment.sh; probe python3 torch; echo $GPUS $HOPPER; "
              "probe python3 torch numpy || echo $STATUS $FOUND")
    done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True)
    assert done.stdout.splitlines() == [found, "4 2.11.0"]


# Runs the probe as Python 3.9 would
OLD = f"""#!/bin/sh
exec "{sys.executable}" -c 'import sys; sys.version_info = (3, 9, 18); code = sys.argv[2]; exec(code)' "$@"
"""


def test_old_python(place):
    """Told in one line, before anything is installed, even if a .venv of the same age is there."""
    program(place / "bin" / "python3", OLD)
    for _ in range(2):
        before = sorted(place.rglob("*"))
        status, lines, _ = run(place)
        assert status == 1 and len(lines) == 1 and lines[0].startswith("error: python3 is Python 3.9 here, but 3.11 ")
        assert sorted(place.rglob("*")) == before
        program(place / ".venv" / "bin" / "python", OLD)
    standin(place)  # a newer python3 without packages
    status, lines, calls = run(place)
    assert status == 1 and lines == ["error: .venv has a Python older than 3.11; remove it (rm -r .venv) and run this "
                                     "again"] and calls == ["probe"]


def test_no_python(place, monkeypatch):
    for name in ("bash", "env", "dirname"):
        (place / "bin" / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", f"{place}/bin")
    assert run(place) == (1, ["error: there is no python3 on the PATH; install Python 3.11 or newer"], [])


# Makes a .venv whose Python can do what the file probe says once its packages are installed
MAKES = """case "$*" in *venv*)
  mkdir -p .venv/bin; cat > .venv/bin/python <<'E'
#!/bin/sh
case "$*" in
  *device_count*) [ -e .venv/installed ] || exit 4; cat probe ;;
  *requirements*) echo "${{*##*-r }}" >> files; {install} ;;
  *) echo "$@" ;;
esac
E
chmod +x .venv/bin/python ;; esac"""
MADE = ["Making .venv and installing requirements.txt (a minute or more; PyTorch is large).",
        "No NVIDIA GPU here: running the CPU demo on the bundled sample.", "train_gpt.py --preset=demo"]


@pytest.mark.parametrize("stale", [None, "dangling", "link", "broken"])
def test_venv_is_made_anew(place, stale):
    """A missing .venv, one whose interpreter is gone or does not start, and a link to a folder that is gone."""
    if stale == "link":
        (place / ".venv").symlink_to(place / "gone")
    elif stale == "dangling":
        (place / ".venv" / "bin").mkdir(parents=True)
        (place / ".venv" / "bin" / "python").symlink_to(place / "gone")
    elif stale == "broken":
        program(place / ".venv" / "bin" / "python", "#!/bin/sh\necho 'Fatal Python error' >&2\nexit 1\n")
    standin(place, rest=MAKES.format(install="touch .venv/installed"))
    (place / "probe").write_text("0 0\n")
    status, lines, _ = run(place)
    told = ["The Python of .venv does not start any more: .venv is made anew."] * bool(stale)
    assert status == 0 and lines == told + MADE


@pytest.mark.parametrize("listed, probe, files", [
    (False, "0 0", ["requirements.txt"]), (True, "1 0", ["requirements-gpu.txt"]),
    (True, "1 1", ["requirements-gpu.txt", "requirements-hopper.txt"])])
def test_packages_for_the_machine(place, listed, probe, files):
    if listed:
        has_gpu(place)
    standin(place, rest=MAKES.format(install="touch .venv/installed"))
    (place / "probe").write_text(probe)
    status, lines, _ = run(place)
    assert status == 0 and f"installing {files[0]}" in lines[0]
    assert (place / "files").read_text().split() == files


def test_tests_leave_the_torch_of_runs_alone(place):
    """Another torch than that of the tests in a .venv without their packages stays; theirs is completed."""
    has_gpu(place)
    standin(place)
    standin(place, "echo 2.11.0; exit 4", path=".venv/bin/python")
    status, lines, calls = run(place, script="test.sh")
    assert status == 1 and calls == ["probe", "probe"] and len(lines) == 1
    assert lines[0].startswith("error: .venv has torch 2.11.0") and "pip install -r requirements.txt" in lines[0]
    [pinned] = [line for line in (place / "requirements.txt").read_text().splitlines() if line.startswith("torch==")]
    for found in (f"{pinned.removeprefix('torch==')}+cpu", ""):
        standin(place, f"echo {found}; exit 4", path=".venv/bin/python")
        calls = run(place, script="test.sh")[2]
        assert calls[-2:] == ["-m pip install --quiet -r requirements.txt ", "probe"]


def test_install_that_fails_goes_on(place):
    """One line names it, and the same command goes on with the same .venv."""
    standin(place, rest=MAKES.format(install="[ -e net ] || exit 1; touch .venv/installed"))
    (place / "probe").write_text("0 0\n")
    status, lines, _ = run(place)
    assert status == 1 and lines[1:] == ["error: requirements.txt could not be installed, see above; run this again to "
                                         "continue"]
    (place / "net").touch()
    status, lines, _ = run(place)
    assert status == 0 and lines == MADE
    (place / "bin" / "python3").unlink()  # .venv is enough
    program(place / "bin" / "python3", "#!/bin/sh\nexit 127\n")
    assert run(place)[:2] == (0, MADE[1:])


def test_venv_that_cannot_be_made(place):
    standin(place, rest='case "$*" in *venv*) exit 1;; esac')
    status, lines, _ = run(place)
    assert status == 1 and lines[1] == ("error: python3 cannot make .venv; on Debian and Ubuntu, install the package "
                                        "python3-venv")


def test_torch_that_fails(place):
    """A torch whose libraries are missing is named, after requirements.txt could not mend it."""
    (place / "broken").mkdir()
    (place / "broken" / "torch.py").write_text("raise OSError('libcudart.so: cannot open')\n")
    program(place / ".venv" / "bin" / "python", f'#!/bin/sh\n[ "$1" = -m ] && exit 0\n'
            f'PYTHONPATH="{place}/broken" exec "{sys.executable}" "$@"\n')
    standin(place)
    status, lines, _ = run(place)
    assert status == 1 and lines[1] == ("error: requirements.txt is installed in .venv, but its torch fails: "
                                        "libcudart.so: cannot open")
