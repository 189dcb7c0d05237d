"""Training processes for tests, many and cheap: a server that has imported everything forks one per request.

Starting Python with torch takes seconds, a fork milliseconds, so that a test can kill fifty processes. The server
itself never computes anything: autograd can't be used before a fork. Run as a program this file is the server; the
class `Forks` is its client. Processes of a group get the environment that torchrun would give them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(folder) for folder in sorted((ROOT / "tests").iterdir()) if folder.is_dir()]


class Forks:
    """Starts and waits for processes; use it in a `with` statement."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.pids: set[int] = set()
        return self

    def __exit__(self, *error):
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait(30)

    def _ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, job: str, log: Path, environment: dict | None = None, **arguments) -> int:
        """Fork a process that calls a function of this file; its output goes to `log`. Returns its id."""
        pid = self._ask(start=job, log=str(log), environment=environment or {}, arguments=arguments)
        self.pids.add(pid)
        return pid

    def wait(self, pid: int, timeout: float = 120) -> int:
        """The exit code (minus the number of the signal that ended it)."""
        code = self._ask(wait=pid, timeout=timeout)
        assert code is not None, f"process {pid} did not end within {timeout} s"
        self.pids.discard(pid)
        return code

    def run(self, job: str, log: Path, **arguments) -> int:
        """Start and wait."""
        return self.wait(self.start(job, log, **arguments))

    def start_group(
        self, job: str, log: Path, size: int = 2, environment: dict | None = None, **arguments
    ) -> list[int]:
        """Processes that find each other; the output of rank r goes to `<log>.r`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}
        return [
            self.start(job, Path(f"{log}.{r}"), {**common, "RANK": str(r), "LOCAL_RANK": str(r)}, **arguments)
            for r in range(size)
        ]

    def run_group(self, job: str, log: Path, size: int = 2, **arguments) -> list[int]:
        """Start a group and wait; returns the exit codes by rank."""
        return [self.wait(pid) for pid in self.start_group(job, log, size, **arguments)]


# ------------------------------------------------------------------------------------------------------------ jobs


def train(arguments: list[str], command: str = "train") -> int:
    """examples/train.py with these arguments, or another command."""
    specification = importlib.util.spec_from_file_location("command", ROOT / "examples" / f"{command}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["command"] = module  # dataclasses look for it
    specification.loader.exec_module(module)
    return module.main(arguments)


def in_folder(command: str, arguments: list[str], folder: str) -> int:
    """A command in a folder."""
    os.chdir(folder)
    return train(arguments, command)


def script_in_folder(path: str, folder: str) -> int:
    """A Python file, run as a program in a folder."""
    import runpy

    os.chdir(folder)
    runpy.run_path(path, run_name="__main__")
    return 0


def attacked(command: str, arguments: list[str], folder: str) -> int:
    """A command in a folder; at its end it prints the seconds that it computed and its largest memory in bytes.

    It can't take much more memory than an attack may: the machine has other things to do.
    """
    import resource

    from midilite.commands.launch import run

    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 5 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        return run(command, arguments)
    finally:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        sys.stdout.flush()
        sys.stderr.flush()
        print(f"@usage {usage.ru_utime + usage.ru_stime} {usage.ru_maxrss * 1024}", flush=True)


def _patched(owner, name: str, before) -> None:
    """Call `before(*arguments)` ahead of every call of a function or method."""
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        before(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(arguments: list[str], step: int, rank: int = 0) -> int:
    """The same; one rank is killed when so many steps are done."""
    from midilite.training.trainer import Trainer

    mine = os.environ.get("RANK", "0") == str(rank)
    _patched(Trainer, "step", lambda trainer, at: _die() if mine and at == step else None)
    return train(arguments)


def train_with_a_failing_sample(arguments: list[str], rank: int, step: int) -> int:
    """The same; one rank can't read its scene at a step."""
    from midilite.training.tasks.lora import LoRATask

    def fail(task, scenes, at):
        if at == step and os.environ["RANK"] == str(rank):
            raise ValueError("scene_7/surface.npy: broken on purpose")

    _patched(LoRATask, "draw", fail)
    return train(arguments)


def infer_with_a_failing_rank(arguments: list[str], rank: int) -> int:
    """examples/infer.py; one rank fails in the middle of the second denoising step."""
    from midilite.inference import parallel as parallel_inference

    calls = []

    def fail(*inputs):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == str(rank):
            raise ValueError("broken on purpose")

    _patched(parallel_inference, "all_gather", fail)
    return train(arguments, "infer")


def train_slowly(arguments: list[str], seconds: float) -> int:
    """The same; every step takes so much longer."""
    from midilite.training.trainer import Trainer

    _patched(Trainer, "step", lambda trainer, at: time.sleep(seconds))
    return train(arguments)


def train_telling_dropout(arguments: list[str]) -> int:
    """The same; prints the first numbers that dropout would draw in each step."""
    import torch

    from midilite.training.tasks.lora import LoRATask

    _patched(LoRATask, "loss", lambda *rest: print("draws", torch.rand(2, generator=_copy_of_the_generator()).tolist()))
    return train(arguments)


def _copy_of_the_generator():
    import torch

    return torch.default_generator.clone_state()


def call(module: str, function: str) -> int:
    """A function of a test file; prints what it returns as JSON."""
    import importlib

    print(json.dumps(getattr(importlib.import_module(module), function)()))
    return 0


def toy(output_dir: str, die_at: int | None = None) -> int:
    """Three saved steps of a tiny task and one more save of the last; killed before its `die_at`-th file operation."""
    import shutil

    from torch import device
    from toy import Toy

    from midilite.common.distributed import World
    from midilite.training.options import TrainOptions
    from midilite.training.trainer import Trainer, find_start

    calls = 0

    def count(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == die_at:
            _die()

    assert shutil.rmtree.avoids_symlink_attacks is not None  # it is asked for by now, before os.unlink is another
    os.fsync = lambda handle: None  # a killed process loses nothing that was not flushed, only a computer does
    for name in ("replace", "mkdir", "unlink", "rmdir", "fsync"):
        _patched(os, name, count)
    options = TrainOptions(
        output_dir=output_dir, max_train_steps=3, checkpointing_steps=1, keep_checkpoints=2, learning_rate=0.1,
        batch_size=1, resume_from_checkpoint="latest", ema_decay=0.9,
    )  # fmt: skip
    trainer = Trainer(Toy(), options, World(), device("cpu"))
    trainer.train(find_start(options, World()))
    trainer.save()
    trainer.save_weights("final")
    print("calls", calls)
    return 0


# ---------------------------------------------------------------------------------------------------------- server


def _child(request: dict) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    from midilite.commands.launch import run_command

    run_command(lambda: globals()[request["start"]](**request["arguments"]))


def _wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _serve() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    import torch._dynamo  # noqa: F401 - imported once here, not in every child (optimizers do)
    import torch.distributed.fsdp  # noqa: F401

    import midilite.commands.dry_run  # noqa: F401

    if importlib.util.find_spec("tensorboard"):
        import torch.utils.tensorboard  # noqa: F401
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["timeout"])
        else:
            answer = os.fork()
            if not answer:
                try:
                    _child(request)
                finally:  # run_command leaves by SystemExit
                    code = getattr(sys.exc_info()[1], "code", 1)
                    if not isinstance(sys.exc_info()[1], SystemExit):
                        import traceback

                        traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(code or 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
