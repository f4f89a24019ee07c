"""Forked and spawned workers: each records on its own, and none touches its parent's recording."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import dodoco_ext as dodoco
from children import HERE, line_of, process, say


def test_a_forked_child_writes_nothing_and_ends_nothing() -> None:
    with process(
        """
        pid = os.fork()
        if pid == 0:
            print("child", probe.record_ids(IDS), flush=True)
            probe.recorder.add_fault(cases._C.Fault.INTERNAL)
            sys.exit(0)  # runs finalizers, as a worker's orderly end does
        os.waitpid(pid, 0)
        print("parent", probe.record_ids(IDS), flush=True)
        sys.stdin.readline()
        """
    ) as (child, path):
        assert line_of(child) == "child 1"
        assert line_of(child) == "parent 0"
        reader = dodoco.open(path)
        assert reader.state == "live"
        assert reader.snapshot().layers[0].passes == 2
        assert reader.header["num_faults"] == 0
        say(child)
        assert child.wait() == 0
        assert reader.state == "closed"


def test_a_forked_child_may_close_explicitly_without_ending_its_parents_recording() -> None:
    with process(
        """
        pid = os.fork()
        if pid == 0:
            probe.recorder.close()
            os._exit(0)
        os.waitpid(pid, 0)
        print(probe.record_ids(IDS), flush=True)
        sys.stdin.readline()
        """
    ) as (child, path):
        assert line_of(child) == "0"
        reader = dodoco.open(path)
        assert reader.state == "live"
        assert reader.snapshot().layers[0].passes == 2


def test_a_surviving_child_does_not_keep_its_dead_parents_recording_alive() -> None:
    with process(
        """
        mine, its = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(its, b"x")
            time.sleep(60)
        os.read(mine, 1)  # fork() is over there, too
        print(pid, flush=True)
        time.sleep(60)
        """
    ) as (child, path):
        orphan = int(line_of(child))
        try:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            os.kill(orphan, 0)  # it lives
            assert dodoco.open(path).state == "dead"
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_a_forked_child_may_record_on_its_own() -> None:
    with process(
        """
        pid = os.fork()
        if pid == 0:
            own = cases.Probe.open((4, 2))
            own.record_ids(IDS)
            own.record_ids(IDS)
            own.recorder.close()
            print(own.path, flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        """
    ) as (child, path):
        own = Path(line_of(child))
        child.wait()
        assert own != path
        assert dodoco.open(own).snapshot().layers[0].passes == 2
        assert dodoco.open(path).snapshot().layers[0].passes == 1


def test_a_program_started_by_the_owner_does_not_inherit_the_lock() -> None:
    with process(
        """
        import subprocess
        sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
        print(sleeper.pid, flush=True)
        time.sleep(60)
        """
    ) as (child, path):
        sleeper = int(line_of(child))
        try:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            assert dodoco.open(path).state == "dead"
        finally:
            os.kill(sleeper, signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_record_on_their_own_while_their_parent_does(method: str) -> None:
    with process(
        f"""
        import children, multiprocessing
        context = multiprocessing.get_context({method!r})
        paths = context.SimpleQueue()
        workers = [
            context.Process(target=children.record_on_its_own, args=(passes, paths))
            for passes in (3, 5)
        ]
        for worker in workers:
            worker.start()
        passes = 1
        while any(worker.is_alive() for worker in workers):
            probe.record_ids(IDS)
            passes += 1
        print(passes, *(worker.exitcode for worker in workers), flush=True)
        print(*(paths.get() for _ in workers), flush=True)
        """
    ) as (child, path):
        passes, *codes = map(int, line_of(child).split())
        assert codes == [0, 0]
        own = [dodoco.open(each) for each in line_of(child).split()]
        assert child.wait() == 0
        assert sorted(each.snapshot().layers[0].passes for each in own) == [3, 5]
        assert dodoco.open(path).snapshot().layers[0].passes == passes > 1
        for reader in (*own, dodoco.open(path)):
            assert reader.state == "closed"
            layer = reader.snapshot().layers[0]
            assert layer.counts.tolist() == [n * layer.passes for n in (1, 2, 1, 0)]


def test_forking_while_another_thread_records() -> None:
    """The child has the thread's half-done pass, and not the thread: it must wait for nothing."""
    with process(
        """
        ids, stop, passes = np.tile(IDS, (20_000, 1)), threading.Event(), []
        def work():
            while not stop.is_set():
                passes.append(probe.record_ids(ids))
        thread = threading.Thread(target=work)
        thread.start()
        statuses = []
        for _ in range(40):
            pid = os.fork()
            if pid == 0:
                signal.alarm(30)  # what waits for ever dies of it
                own = cases.Probe.open((4, 2))
                results = [own.record_ids(ids), own.snapshot().layers[0].passes]
                results += [probe.record_ids(ids), probe.record_ids(IDS)]
                own.recorder.close()
                probe.recorder.close()
                os._exit(0 if results == [0, 1, 1, 1] else 1)
            statuses.append(os.waitpid(pid, 0)[1])
        stop.set()
        thread.join()
        print(set(statuses), set(passes), len(passes), flush=True)
        """
    ) as (child, path):
        assert child.wait() == 0
        *good, passes = line_of(child).rsplit(" ", 1)
        assert good == ["{0} {0}"]
        layer = dodoco.open(path).snapshot().layers[0]
        assert layer.counts.tolist() == [n * (20_000 * int(passes) + 1) for n in (1, 2, 1, 0)]


def test_forking_while_another_thread_opens_and_closes() -> None:
    """No lock is left behind in the child, neither a mutex nor the lock of a recording."""
    with process(
        """
        stop, paths = threading.Event(), []
        def work():
            while not stop.is_set():
                each = cases.Probe.open((4, 2))
                each.record_ids(IDS)
                paths.append(each.path)
                each.recorder.close()
        thread = threading.Thread(target=work)
        thread.start()
        children = []
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                cases.Probe.open((4, 2)).recorder.close()
                while True:
                    time.sleep(1)
            children.append(pid)
        stop.set()
        thread.join()
        # Every recording has ended, and no child that lives on says otherwise.
        print(sum(cases._C.owner_alive(str(p)) for p in paths if p.exists()), len(paths) > 0)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        print({os.waitpid(pid, 0)[1] for pid in children}, flush=True)
        """
    ) as (child, _):
        assert child.wait() == 0
        assert line_of(child) == "0 True"
        assert line_of(child) == f"{{{int(signal.SIGKILL)}}}"


TOY = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import torch, toy
import dodoco_ext as dodoco
from dodoco_ext.errors import InputError
torch.set_num_threads(1)
model, tokens = toy.ToyModel(), toy.some_tokens()
"""


def test_one_model_attached_to_in_two_processes_makes_two_recordings() -> None:
    with process(
        """
        passes = [tokens] * (5 if pid == 0 else 3)
        with dodoco.attach(model) as a:
            for each in passes:
                model(each)
            toy.assert_recorded(a, model, passes)
            if pid == 0:
                os.write(its, str(a.path).encode())
                os._exit(0)
            print(a.path, flush=True)
            print(os.read(mine, 4096).decode(), os.waitpid(pid, 0)[1], flush=True)
            sys.stdin.readline()
        """,
        start=TOY + "mine, its = os.pipe()\npid = os.fork()\n",
    ) as (child, path):
        its, status = line_of(child).split()
        assert status == "0"
        parent, forked = dodoco.open(path), dodoco.open(its)
        assert (parent.state, forked.state) == ("live", "dead")
        assert [each.snapshot().layers[0].passes for each in (parent, forked)] == [3, 5]


def test_a_forked_child_detaches_before_it_attaches_and_its_parent_goes_on() -> None:
    with process(
        """
        pid = os.fork()
        if pid == 0:
            model(tokens)  # counts nowhere
            try:
                dodoco.attach(model)
            except InputError as error:
                print(error, flush=True)
            a.detach()
            with dodoco.attach(model) as own:
                model(tokens)
                toy.assert_recorded(own, model, [tokens])
                print(own.path, flush=True)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        model(tokens)
        toy.assert_recorded(a, model, [tokens, tokens])
        print(status, flush=True)
        sys.stdin.readline()
        """,
        start=TOY + "a = dodoco.attach(model)\nmodel(tokens)\nprint(a.path, flush=True)\n",
    ) as (child, path):
        assert "already attached to: detach() that first" in line_of(child)
        own = Path(line_of(child))
        assert line_of(child) == "0"
        assert dodoco.open(own).state == "closed"
        assert dodoco.open(path).state == "live"
        assert dodoco.open(path).snapshot().layers[0].passes == 2
