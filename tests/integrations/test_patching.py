"""Attributes come back exactly: after errors, in any order, from any thread, across a fork, in copies."""

import os
import signal
import sys
import threading
import types

import pytest

from rlkern.integrations.patching import Patch, _sites, holders


def first():
    return 1


def second():
    return 2


@pytest.fixture
def module():
    m = types.ModuleType("patched_package")
    m.function, m.number = first, 7
    sys.modules[m.__name__] = m
    yield m
    for name in [n for n in sys.modules if n.split(".")[0] == m.__name__]:
        del sys.modules[name]
    assert not _sites


def test_a_context_and_a_permanent_call(module):
    with Patch([(module, "function", second), (module, "number", 8)]) as patch:
        assert module.function is second and module.number == 8
    assert module.function is first and module.number == 7
    patch.undo()  # once more does nothing
    assert module.function is first
    patch = Patch([(module, "function", second)])
    assert module.function() == 2
    patch.undo()
    assert vars(module)["function"] is first


def test_an_exception_restores(module):
    with pytest.raises(KeyError, match="in the block"), Patch([(module, "function", second)]):
        raise KeyError("in the block")
    assert module.function is first


def test_a_patch_that_grows_is_undone_as_one_and_grows_no_more(module):
    patch = Patch([(module, "function", second)])
    patch.extend([(module, "number", 8)])
    assert module.function is second and module.number == 8
    patch.undo()
    patch.extend([(module, "number", 9)])
    assert module.function is first and module.number == 7


def test_a_missing_attribute_is_refused_before_anything_changes(module):
    with pytest.raises(AttributeError, match="patched_package.nothing does not exist"):
        Patch([(module, "function", second), (module, "nothing", 1)])
    assert module.function is first and not hasattr(module, "nothing")


def test_a_replacement_that_fails_takes_the_others_back(module):
    class Frozen(type):
        def __setattr__(cls, name, value):
            raise TypeError("frozen")

    class Owner(metaclass=Frozen):
        x = 1

    with pytest.raises(TypeError, match="frozen"):
        Patch([(module, "function", second), (Owner, "x", 2)])
    assert module.function is first and Owner.x == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_patches_overlap_in_any_order(module, order):
    values = [lambda: "a", lambda: "b", lambda: "c"]
    patches = [Patch([(module, "function", v)]) for v in values]
    standing = [0, 1, 2]
    for i in order:
        assert module.function is values[standing[-1]]
        patches[i].undo()
        standing.remove(i)
    assert module.function is first


def test_the_same_value_nested_stands_until_the_last_leaves(module):
    with Patch([(module, "function", second)]):
        with Patch([(module, "function", second)]):
            pass
        assert module.function is second
    assert module.function is first


def test_an_inherited_attribute_leaves_no_trace():
    class Base:
        def method(self):
            return "base"

        @staticmethod
        def static():
            return "static"

    class Child(Base):
        pass

    raw = vars(Base)["static"]
    with Patch([(Child, "method", lambda self: "child"), (Base, "static", staticmethod(second))]):
        assert Child().method() == "child" and Base().method() == "base" and Child.static() == 2
    assert "method" not in vars(Child) and vars(Base)["static"] is raw


def test_what_others_put_over_it_is_left_with_a_warning(module):
    patch = Patch([(module, "function", second)])
    other = module.function = lambda: "other"
    with pytest.warns(RuntimeWarning, match="patched_package.function was changed by others"):
        patch.undo()
    assert module.function is other


def test_modules_imported_meanwhile_get_the_original_back(module):
    def late(name: str) -> types.ModuleType:
        m = types.ModuleType(f"{module.__name__}.{name}")
        m.alias, m.untouched = module.function, len
        sys.modules[m.__name__] = m
        return m

    stranger = types.ModuleType("patched_package_but_not_quite")
    with Patch([(module, "function", second)], package=module.__name__):
        outer = late("outer")
        stranger.alias = module.function
        sys.modules[stranger.__name__] = stranger
        with Patch([(m, name, second) for m, name in holders(module.__name__, second)], package=module.__name__):
            inner = late("inner")
        assert outer.alias is second and inner.alias is second
    del sys.modules[stranger.__name__]
    assert outer.alias is first and inner.alias is first and outer.untouched is len
    assert stranger.alias is second  # not of that package


def test_undoing_one_of_two_places_with_the_same_value_leaves_the_other(module):
    module.other = len
    with Patch([(module, "function", second)], package=module.__name__):
        with Patch([(module, "other", second)], package=module.__name__):
            pass
        assert module.function is second and module.other is len


def test_holders_finds_every_name_in_loaded_modules_of_the_package(module):
    sub = types.ModuleType(f"{module.__name__}.sub")
    sub.renamed, sub.again, sub.other = first, first, second
    sys.modules[sub.__name__] = sub
    assert sorted((m.__name__, name) for m, name in holders(module.__name__, first)) == [
        ("patched_package", "function"),
        ("patched_package.sub", "again"),
        ("patched_package.sub", "renamed"),
    ]


def test_threads_patch_and_leave_at_once(module):
    wrong, barrier = [], threading.Barrier(8)

    def work(value):
        barrier.wait()
        for _ in range(200):
            with Patch([(module, "function", value)]):
                if module.function is first:
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(lambda i=i: i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and module.function is first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_everywhere_is_one_piece(module):
    """A thread that looks for the bindings while another one undoes would find only some of them."""
    subs = [types.ModuleType(f"{module.__name__}.sub{i}") for i in range(20)]
    for sub in subs:
        sub.copied = first
        sys.modules[sub.__name__] = sub
    wrong, interval = [], sys.getswitchinterval()

    def work():
        for _ in range(100):
            with Patch.everywhere(module.__name__, [(module, "function", second)]):
                wrong.extend(m for m, value in [(module, module.function), *((sub, sub.copied) for sub in subs)] if value is not second)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and module.function is first and all(sub.copied is first for sub in subs) and not _sites


def test_a_child_forked_while_another_thread_patches_can_patch(module):
    stop = threading.Event()

    def work():
        while not stop.is_set():
            with Patch([(module, "function", second)]):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(10)  # a lock that was copied locked would hang here
                with Patch([(module, "number", 9)]):
                    os._exit(0 if module.number == 9 else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
