"""Threads of the CPU kernels: whoever calls, whenever it calls, gets all of the work done, also in a forked child."""

import json
import subprocess
import sys

import pytest

from octo_run.kernels.cpu import native

_ROUNDS = """
import json, os, random, sys, threading, time
import torch
from octo_run.kernels.cpu.linear import packed_linear
from octo_run.kernels.cpu.replay import Replays
from octo_run.kernels.linear.packed import pack

torch.manual_seed(0)
weight = pack("int8", torch.randint(0, 256, (700, 256), dtype=torch.uint8), 256, torch.rand(700) + 0.1)
x = torch.randn(1, 256)
def product():
    out = torch.full((1, 700), torch.nan)
    assert packed_linear(x, weight, None, out)
    return out
torch.set_num_threads(1)
expected, wrong = product(), []

# Products of products, with nothing between them: each needs all of the one before.
square = pack("int8", torch.randint(0, 256, (256, 256), dtype=torch.uint8), 256, torch.rand(256) / 1000)
links = [torch.empty(1, 256) for _ in range(30)]
def chain():
    for one, other in zip(links, links[1:]):
        assert packed_linear(one, square, None, other)
starts, ends, replays = (x, torch.randn(1, 256)), [], Replays()
for start in starts:
    links[0].copy_(start)
    chain()
    ends.append(links[-1].clone())
for threads in (2, 3, 4):
    torch.set_num_threads(threads)
    for number in range(400):  # what is left of one run is wrong in the next one
        links[0].copy_(starts[number % 2])
        replays.run("chain", chain)
        if not torch.equal(links[-1], ends[number % 2]):
            wrong.append(number)
def rounds(seed):
    draw = random.Random(seed)
    for number in range(400):
        torch.set_num_threads(draw.randint(1, 4))  # of all of them: it changes under their hands
        if not torch.equal(product(), expected):
            wrong.append(number)
        if draw.random() < 0.05:
            time.sleep(0.002)  # those who watch fall asleep
callers = [threading.Thread(target=rounds, args=(seed,)) for seed in range(3)]
for one in callers:
    one.start()
for one in callers:
    one.join()
torch.set_num_threads(3)
product()
child = os.fork()
if not child:
    alone = len(os.listdir("/proc/self/task"))
    right = torch.equal(product(), expected)
    os._exit(0 if right and (alone, len(os.listdir("/proc/self/task"))) == (1, 3) else 1)
print(json.dumps([wrong, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_rounds_of_several_callers_and_of_a_child() -> None:
    if native.library() is None:
        pytest.skip(native.path_name())
    done = subprocess.run([sys.executable, "-c", _ROUNDS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [[], 0]
