"""Freed memory stays mapped: a program on CPUs maps the memory of its temporaries only once."""

import os
import subprocess
import sys

import pytest

from larp_jax.runtime import allocator

# Prints the median number of page faults of a run, for a program with 64 MiB of temporaries.
PROGRAM = """
import resource, sys
from larp_jax.runtime import allocator
if sys.argv[1] == "keep":
    assert allocator.keep_freed_memory()
import jax, jax.numpy as jnp
x = jnp.ones((4096, 8))
f = jax.jit(lambda x: (x @ x.T) @ x)
for _ in range(6):  # until the heap no longer changes
    f(x).block_until_ready()
counts = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(counts)[4])  # the kernel may take idle pages back at any time
"""


def page_faults(how):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="of glibc")
def test_temporaries_are_mapped_once():
    pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    # for unknown reasons, about one process in fifty maps its temporaries again in every run
    assert any(page_faults("keep") < pages / 10 for _ in range(3))
    assert page_faults("let go") > pages / 10  # without it they are mapped in every run


@pytest.mark.parametrize(
    ("platforms", "devices", "expected"),
    [
        ("cpu", ["/dev/nvidia0"], False),
        ("cuda,cpu", [], True),
        ("", ["/dev/nvidia0"], True),
        ("", ["/dev/accel0"], True),
        ("", [], False),
    ],
)
def test_nothing_is_changed_if_there_may_be_an_accelerator(monkeypatch, platforms, devices, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(
        allocator.glob, "glob", lambda pattern: [name for name in devices if name[:9] == pattern[:9]]
    )
    assert allocator._may_have_accelerator() == expected
