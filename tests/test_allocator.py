"""The arena: tensors are whole wherever they lie, freed memory is taken again, and goes back when that is asked for."""

import os
import random
import sys
import threading

import pytest
import torch
from prepared import Prepared

from bpo_fast import allocator
from bpo_fast.attention import has_native

MIB = 2**20
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc"),
    pytest.mark.skipif(not has_native(), reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def prepared():
    with Prepared("import test_allocator, bpo_fast.cli, bpo_fast.loading") as process:
        yield process


@pytest.fixture
def alone(prepared):
    """Runs a function of this file in a process of its own, where PyTorch's allocator may be exchanged."""

    def alone(function, *, opened="allocator.keep_freed_memory(); allocator.open_arena()", **environ):
        done = prepared.run(
            f"from bpo_fast import allocator; {opened}; import test_allocator; test_allocator.{function}()", env=environ
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return alone


def resident():
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":") for line in status)
    return int(fields["RssAnon"].split()[0]) * 1024


def taken(tensors):
    before = resident()
    kept = [torch.ones(n, dtype=torch.uint8) for n in tensors]
    return kept, resident() - before


def take_again():
    del_me, _ = taken([20 * MIB, 3 * MIB, 20 * MIB])
    places = sorted(t.data_ptr() for t in del_me)
    del del_me
    again, grown = taken([20 * MIB, 3 * MIB, 20 * MIB])
    assert sorted(t.data_ptr() for t in again) == places
    assert grown < MIB
    del again
    (joined,), grown = taken([42 * MIB])  # neighbors that are free are one block
    assert joined.data_ptr() == min(places)
    assert grown < MIB


def multiply_many_sizes():
    weight = torch.zeros(64, 256, dtype=torch.bfloat16)

    def multiply(first, last):
        for num_rows in range(first, last):
            torch.zeros(num_rows, 64, dtype=torch.bfloat16) @ weight

    multiply(1, 350)
    before = resident()
    multiply(350, 410)  # 30 MiB of code
    assert resident() - before < 8 * MIB


def give_back():
    kept, grown = taken([8 * MIB, 32 * MIB, 8 * MIB])
    assert grown > 47 * MIB
    kept[1] = None
    before = resident()
    assert before > 47 * MIB
    allocator.give_back_freed_memory()
    assert before - resident() > 31 * MIB
    assert all(bool((t == 1).all()) for t in (kept[0], kept[2]))
    assert bool((torch.zeros(32 * MIB, dtype=torch.uint8) == 0).all())


def stay_whole():
    """Threads that take, keep, resize and free blocks of all sizes find in each what they wrote."""
    wrong = []

    def work(seed):
        draw, held = random.Random(seed), {}
        for i in range(1500):
            size = int(2 ** draw.uniform(0, 22))
            if held and (draw.random() < 0.5 or len(held) > 20):
                key = draw.choice(list(held))
                value, tensor = held.pop(key)
                if draw.random() < 0.3:
                    tensor.resize_(tensor.numel() + size)[-size:] = value
                if tensor.data_ptr() % 64 or bool((tensor != value).any()):
                    wrong.append((seed, i))
            else:
                value = draw.randrange(256)
                held[i] = value, torch.full((size,), value, dtype=torch.uint8)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def serve_many_threads():
    """Nothing but taking and giving, by more threads than there are cores."""

    def work():
        for _ in range(400):
            del_me = [torch.empty(70_000 + 64 * i, dtype=torch.uint8) for i in range(50)]
            del del_me[::2]

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = resident()
    kept, _ = taken([MIB] * 20)  # what came out of it is one piece again
    assert len({t.data_ptr() for t in kept}) == 20
    assert all(bool((t == 1).all()) for t in kept)
    assert resident() - before < 24 * MIB


def live_through_a_fork():
    """The child of a fork reads its parent's blocks and takes blocks of its own."""
    torch.set_num_threads(1)  # OpenMP's threads do not live through one
    block = torch.full((MIB,), 7)
    child = os.fork()
    if child == 0:
        os._exit(int(int(torch.full((2 * MIB,), 1).sum() + block.sum()) != 9 * MIB))
    assert os.waitpid(child, 0)[1] == 0


def count_for_the_profiler():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        block = torch.empty(4 * MIB)
        del block
    events = profile.events() or []
    sizes = [event.cpu_memory_usage for event in events if event.name in ("aten::empty", "[memory]")]
    assert sorted(sizes) == [-16 * MIB, 16 * MIB]


def more_than_there_is():
    with pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**50, dtype=torch.uint8)
    for less_than_nothing in (-1, -64):
        with pytest.raises(RuntimeError, match="alloc"):
            torch.empty(MIB).untyped_storage().resize_(less_than_nothing)
    assert int(torch.ones(MIB).sum()) == MIB


def say_whether_it_is_open():
    print(allocator.arena_is_open())


IN_THE_ARENA = (take_again, give_back, stay_whole, serve_many_threads, live_through_a_fork)
IN_THE_ARENA += (count_for_the_profiler, more_than_there_is)


@pytest.mark.parametrize("function", IN_THE_ARENA, ids=lambda function: function.__name__)
def test_in_the_arena(function, alone):
    alone(function.__name__)


def test_a_command_opens_the_arena_when_it_computes_on_the_cpu(alone):
    opened = (
        "from bpo_fast import cli, loading; cli.app = lambda **_: loading.pick_device('run.device', 'cpu');"
        "assert not allocator.arena_is_open(); cli.main()"
    )
    assert alone("say_whether_it_is_open", opened=opened) == ["True"]


def test_elsewhere_pytorch_keeps_its_allocator(alone):
    opened = "from bpo_fast import loading; loading.pick_device('run.device', 'cpu')"
    assert alone("say_whether_it_is_open", opened=opened) == ["False"]


def test_without_a_compiler_the_c_librarys_allocator_stays(alone):
    found = alone("say_whether_it_is_open", CXX="/no/such/compiler")
    assert found == ["False"]


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_where_addresses_are_counted_the_arena_leaves_them_to_others(limit, alone):
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + 2**34  # enough for the arena
    opened = (
        f"import resource; resource.setrlimit(resource.{limit}, ({most}, -1));"
        "allocator.keep_freed_memory(); allocator.open_arena()"
    )
    assert alone("say_whether_it_is_open", opened=opened) == ["False"]


def test_code_for_sizes_of_long_ago_is_freed():
    code = "from bpo_fast import allocator; allocator.keep_less_code(); import test_allocator; "
    with Prepared("") as process:  # without torch, which is imported after
        done = process.run(code + "test_allocator.multiply_many_sizes()")
    assert done.returncode == 0, done.stderr
