"""Python programs in forks of one process that has imported torch, as that import takes seconds.

    done = forks.run("train_gpt.py", "--preset=demo", cwd=folder)     as subprocess.run([sys.executable, ..]) would

A program is __main__ of a process of its own, with its arguments, environment, folder, signals and exit status. Ranks
that torchrun starts are forks, too. Other than in a new process: what Python, OpenMP and Triton read from the
environment counts as it was before the first fork, hashes of text are the same in all, and at its end no exit handlers
run and nothing is taken apart. So one run of each kind stays a process of its own.
"""

import contextlib
import gc
import importlib.machinery
import importlib.util
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

# What programs use, if it is there; not huggingface_hub, which reads the environment when it is imported
PRELOADED = ("torch", "torch.distributed.run", "torch.utils._device", "triton", "tqdm.auto", "numpy.ma",
             "unittest.mock", "tiktoken", "httpx", "httpx2", "yaml", "filelock")


class Child:
    """A child of this process with what is used of subprocess.Popen; its status comes from _look(seconds)."""

    returncode = None

    def poll(self):
        return self.wait(0)

    def wait(self, timeout=None):
        """The exit status; None after a timeout of 0, TimeoutExpired after another."""
        if self.returncode is None:
            self.returncode = self._look(timeout)
        if self.returncode is None and timeout:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that forks, with more in its environment."""

    def __init__(self, **more):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind("")  # a name that Linux chooses, and no file
        self.listener.listen(64)
        self.folder = tempfile.mkdtemp()
        env = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(self.listener.fileno()), self.folder], stdin=subprocess.PIPE,
            env=env | {"OMP_NUM_THREADS": "1"} | more, pass_fds=[self.listener.fileno()], start_new_session=True)

    def close(self):
        self.server.stdin.close()  # tells it to end
        self.server.wait()
        self.listener.close()
        shutil.rmtree(self.folder)


class Program(Child):
    """A program that was started, with two open files for what it writes; optimized: without its assertions."""

    def __init__(self, *args, stdout, stderr, env=None, cwd=None, optimized=False):
        self.args = [str(arg) for arg in args]
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect(server(optimized).listener.getsockname())
        about = {"args": self.args, "env": dict(os.environ if env is None else env), "cwd": os.path.abspath(cwd or ".")}
        socket.send_fds(self.connection, [json.dumps(about).encode()], [stdout.fileno(), stderr.fileno()])
        self.connection.settimeout(120)  # lest a server that has failed be waited for
        self.pid = int(self.connection.recv(99))

    def _look(self, seconds):
        if select.select([self.connection], [], [], seconds)[0]:
            return int(self.connection.recv(99))


def run(*args, timeout=120, **options):
    """Run a program to its end, with Program's options."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = Program(*args, stdout=out, stderr=err, **options)
        try:
            program.wait(timeout)
        finally:
            program.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(program.args, program.returncode, out.read(), err.read())


servers, lock = {}, threading.Lock()


def server(optimized):
    with lock:  # programs may be started by threads
        if optimized not in servers:
            servers[optimized] = Forks(**{"PYTHONOPTIMIZE": "1"} if optimized else {})
    return servers[optimized]


def close():
    for forks in servers.values():
        forks.close()


class Rank(Child):
    """In place of subprocess.Popen in a fork that runs torchrun: its ranks are forks of it."""

    def __init__(self, args, env, stdout=None, stderr=None, start_new_session=True):
        if args[0] != sys.executable:
            raise ValueError(f"no Python program: {args}")
        outputs = [file.fileno() if file else number for number, file in ((1, stdout), (2, stderr))]
        self.args, self.pid = args, fork(args[1:], env, os.getcwd(), outputs)

    def _look(self, seconds):
        end = time.monotonic() + (1e9 if seconds is None else seconds)
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= end:
                return None
            time.sleep(0.01)


def fork(args, env, cwd, outputs):
    """Run the arguments of a Python in a fork, whose number this returns."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if pid := os.fork():
        return pid
    gc.freeze()  # nothing of the process before is collected here
    os.setsid()
    status = 1
    try:
        become(args, env, cwd, outputs)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else print(end, file=sys.stderr) or 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:  # the frames of the process before do not go on, and Python would take torch apart for half a second
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


class Script(importlib.machinery.SourceFileLoader):
    """A script is compiled once; its bytecode is in a folder, and not beside it."""

    def get_code(self, name):
        before = sys.pycache_prefix, sys.dont_write_bytecode
        sys.pycache_prefix, sys.dont_write_bytecode = self.folder, False
        try:
            return super().get_code(name)
        finally:
            sys.pycache_prefix, sys.dont_write_bytecode = before


def become(args, env, cwd, outputs):
    """Run the arguments of a Python as a new one would."""
    null = os.open(os.devnull, os.O_RDWR)
    for number, source in enumerate((null, *outputs)):
        os.dup2(source, number)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2:  # not closed, lest an old object closes a new file of that number
            with contextlib.suppress(OSError):
                os.dup2(null, number, inheritable=False)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which torchrun handles
    if args[0] == "-u":
        args = args[1:]
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if args[0] == "-m":
        sys.modules.pop(args[1], None)  # as it warns of a module that is there already
        sys.argv, sys.path[0] = args[1:], os.getcwd()
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = args, os.path.dirname(os.path.abspath(args[0]))
        loader = Script("__main__", args[0])
        main = importlib.util.module_from_spec(importlib.util.spec_from_loader("__main__", loader))
        sys.modules["__main__"] = main
        loader.exec_module(main)


def serve(listener, folder):
    """For each connection a fork that starts a program and tells its number and its status; until stdin ends."""
    for module in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"].Popen = Rank
    Script.folder, waiting = folder, []
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, threads  # a fork has but the one that forks
    while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [])[0]):
        connection, _ = ready[0].accept()
        waiting = [pid for pid in waiting if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        waiting.append(os.fork())
        if waiting[-1] == 0:
            text, outputs, *_ = socket.recv_fds(connection, 2**20, 2)
            pid = fork(**json.loads(text), outputs=outputs)
            connection.send(str(pid).encode())
            connection.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
