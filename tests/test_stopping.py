"""Signals are heard at once, whatever the main thread is doing: the first is a wish, the second an order."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import ROOT

BEFORE = """
import ctypes, os, signal, sys, threading, time
from dstrain import stopping
stopping.ECHO_SECONDS = 2.0

def get_stuck():
    "A lock that is never given back, taken in C: no signal interrupts that, and Python runs no handler meanwhile."
    system, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    system.pthread_mutex_lock(mutex)
    print("stuck", flush=True)
    system.pthread_mutex_lock(mutex)

def tell(stop):
    stop.wait()
    print("set", flush=True)
"""
STUCK = """
stop = stopping.stop_on_signals("saving")
threading.Thread(target=tell, args=(stop,), daemon=True).start()
get_stuck()
"""


@contextmanager
def started(code: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", BEFORE + code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_in_native_code_the_first_signal_is_heard_and_the_second_ends(number: int) -> None:
    with started(STUCK) as process:
        assert line(process) == "stuck"
        process.send_signal(number)
        assert line(process) == "set"
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert process.stderr is not None and process.stderr.read() == "saving (again: at once)\n"


def test_in_native_code_an_echo_ends_nothing_and_a_launcher_that_has_gone_neither() -> None:
    with started(STUCK) as process:
        assert line(process) == "stuck"
        process.send_signal(signal.SIGINT)
        assert line(process) == "set"
        for number in (signal.SIGTERM, signal.SIGUSR2):
            process.send_signal(number)
        time.sleep(2.5)
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


def test_before_training_a_signal_ends_a_wait_in_native_code_too() -> None:
    with started("stopping.leave_on_signals('nothing begun')\nget_stuck()") as process:
        assert line(process) == "stuck"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75
        assert process.stderr is not None and process.stderr.read() == "nothing begun\n"


def test_what_waits_to_be_ended_is_quiet_in_native_code_too() -> None:
    code = "stopping.PATIENCE_SECONDS = 0\nstopping.wait_to_be_ended(2)\nget_stuck()"
    with started(code) as process:
        assert line(process) == "stuck"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 2
        assert process.stderr is not None and process.stderr.read() == ""


def test_a_librarys_own_handler_has_the_signal_until_it_is_taken_back() -> None:
    """As Ray's, whose init puts one on SIGTERM."""
    code = """
stop = stopping.stop_on_signals("saving")
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("library"))
signal.set_wakeup_fd(-1)
os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)
print(heard, stop.is_set())
stopping.answer_signals(stop, "saving all")
os.kill(os.getpid(), signal.SIGTERM)
print(heard, stop.is_set(), flush=True)
"""
    with started(code) as process:
        out, err = process.communicate(timeout=30)
        assert (out, err) == ("['library'] False\n['library'] True\n", "saving all (again: at once)\n")


def test_signals_that_are_ignored_stay_so() -> None:
    code = """
from dstrain.lifeline import _keep_quiet
stop = stopping.stop_on_signals("saving")
_keep_quiet()
for _ in range(3):
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.2)
print(stop.is_set(), flush=True)
"""
    with started(code) as process:
        assert process.communicate(timeout=30) == ("False\n", "")


def test_a_forked_process_hears_for_itself() -> None:
    code = """
stop = stopping.stop_on_signals("parent")
child = os.fork()
if child == 0:
    mine = stopping.stop_on_signals("child")
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0 if mine.is_set() else 1)
_, status = os.waitpid(child, 0)
time.sleep(0.2)
print(status, stop.is_set(), flush=True)
"""
    with started(code) as process:
        assert process.communicate(timeout=30) == ("0 False\n", "child (again: at once)\n")


def test_a_burst_of_signals_is_answered_once_each() -> None:
    """Many wishes of one launcher within the echo's time, while the main thread is busy: one answer, and no end."""
    code = """
stopping.ECHO_SECONDS = 60
stop = stopping.stop_on_signals("saving")
os.kill(os.getpid(), signal.SIGINT)
for _ in range(200):
    os.kill(os.getpid(), signal.SIGTERM)
print(stop.is_set(), flush=True)
"""
    with started(code) as process:
        assert process.communicate(timeout=30) == ("True\n", "saving (again: at once)\n")


def test_a_signal_to_a_forked_child_is_none_to_its_parent() -> None:
    code = """
stop = stopping.stop_on_signals("saving")
child = os.fork()
if child == 0:
    time.sleep(20)
    os._exit(0)  # and not on to the next line: 0 is the whole group of processes
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.wait(0.5), flush=True)
"""
    with started(code) as process:
        assert line(process) == "-15 False"
