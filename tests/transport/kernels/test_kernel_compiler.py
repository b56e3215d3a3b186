"""Two processes compile, and nothing of it gets lost on the way."""

import os

import pytest

from transport.kernels import compiler
from transport.kernels.declare import Kernel, all_kernels


def test_two_processes_compile_each_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told, tell = os.pipe()
    parent = os.getpid()
    first = True

    def compile_one(kernel: Kernel) -> str:
        nonlocal first
        if first and os.getpid() == parent:
            # So that there is something left for the other one.
            os.read(told, 1)
        elif first:
            os.write(tell, b"x")
        first = False
        return f"{kernel.name} {os.getpid()}"

    monkeypatch.setattr(compiler, "_compile", compile_one)
    done = [text.split() for text in compiler._compile_all(all_kernels())]
    assert sorted(name for name, _ in done) == sorted(each.name for each in all_kernels())
    processes = {int(process) for _, process in done}
    assert len(processes) == 2 and parent in processes
    os.close(told)
    os.close(tell)


def test_what_fails_in_the_other_process_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told, tell = os.pipe()
    parent = os.getpid()

    def compile_one(kernel: Kernel) -> str:
        if os.getpid() == parent:
            os.read(told, 1)
            return ""
        os.write(tell, b"x" * 100)
        raise ValueError("this one cannot be compiled")

    monkeypatch.setattr(compiler, "_compile", compile_one)
    with pytest.raises(SystemExit):
        compiler._compile_all(all_kernels())
    assert capfd.readouterr().err.splitlines()[-1] == "ValueError: this one cannot be compiled"
    os.close(told)
    os.close(tell)
