"""The first minutes on a GPU: what no other step tells, cheapest first; each result is on disk before the next begins.

    python3 first.py --out FILE.jsonl [--root CHECKOUT] [--gib 4] [--steps a,b] [--limit 150]

Every step is a process of its own with a limit; one that crashes, hangs or breaks the context loses nothing else.
Needs the driver, cuda-bindings, NumPy and msgspec; steps whose name begins with torch_ need a CUDA build of torch.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
STEPS = (
    ("facts", 20),
    ("rules", 20),
    ("vmm_cost", 40),
    ("under_copy", 25),
    ("host_kinds", 60),
    ("order", 40),
    ("torch_storage", 40),
    ("torch_graph_pool", 60),
    ("torch_exit", 40),
)


def setup(root):
    sys.path[:0] = [root, root + "/backend", root + "/tests/gpu", root + "/tests"]


class T:
    """Durations by name, µs."""

    def __init__(self):
        self.us = {}

    def __call__(self, name, f, *a):
        t = time.perf_counter()
        r = f(*a)
        self.us.setdefault(name, []).append((time.perf_counter() - t) * 1e6)
        return r

    def out(self):
        s = lambda v: sorted(v)
        return {
            k: {
                "n": len(v),
                "median_us": round(s(v)[len(v) // 2], 1),
                "max_us": round(max(v), 1),
                "sum_ms": round(sum(v) / 1e3, 2),
            }
            for k, v in self.us.items()
        }


def open_gpu():
    from swap_agent.device.cuda_driver import Context, call, driver

    c = Context(0)
    c.use()
    return c, call, driver()


def facts(gib):
    def line(p):
        try:
            return Path(p).read_text(errors="replace").strip()[:300]
        except OSError as e:
            return str(e)

    import resource

    import numpy

    before = {
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")
    }
    c, call, d = open_gpu()
    import cuda.bindings

    fds = {}
    for n in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{n}")
            flag = fcntl.fcntl(int(n), fcntl.F_GETFD)
        except OSError:
            continue
        if name not in before or "nvidia" in name:
            fds[f"{n} {name}"] = "cloexec" if flag & fcntl.FD_CLOEXEC else "INHERITED BY posix_spawn"
    h = call("cuMemCreate", 2 * MIB, c.allocation, 0)
    fd = int(call("cuMemExportToShareableHandle", h, c.handle_type, 0))
    exported = os.readlink(f"/proc/self/fd/{fd}"), bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
    g = d.CUmemAllocationGranularity_flags
    A = d.CUdevice_attribute
    attr = {}
    for n in (
        "ASYNC_ENGINE_COUNT",
        "HOST_REGISTER_SUPPORTED",
        "PAGEABLE_MEMORY_ACCESS",
        "PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES",
        "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM",
        "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED",
        "HOST_NUMA_ID",
        "INTEGRATED",
    ):
        try:
            attr[n] = int(call("cuDeviceGetAttribute", getattr(A, "CU_DEVICE_ATTRIBUTE_" + n), c.device))
        except Exception as e:
            attr[n] = repr(e)[:80]
    free, total = c.free_and_total_bytes()
    return {
        "python": sys.version.split()[0],
        "cuda-bindings": cuda.bindings.__version__,
        "numpy": numpy.__version__,
        "driver": call("cuDriverGetVersion"),
        "kernel": os.uname().release,
        "uid": os.getuid(),
        "cpus": os.cpu_count(),
        "memory": line("/proc/meminfo").splitlines()[:3],
        "cgroup memory.max": line("/sys/fs/cgroup/memory.max"),
        "thp": line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "shmem thp": line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "free hugetlb": line("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"),
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "/dev/shm free GiB": round(os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize / GIB, 1),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "pci": c.pci_bus_id(),
        "numa": c.numa_node(),
        "free, total GiB": (round(free / GIB, 2), round(total / GIB, 2)),
        "attributes": attr,
        "granularity min, recommended": [
            int(call("cuMemGetAllocationGranularity", c.allocation, x))
            for x in (g.CU_MEM_ALLOC_GRANULARITY_MINIMUM, g.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)
        ],
        "driver's descriptors": fds,
        "exported descriptor is, has cloexec": exported,
    }


def rules(gib):
    """Does the real driver answer as the tests' imitation does? Each question alone: one may kill the process."""
    c, call, d = open_gpu()
    F = 2 * MIB

    def code(f, *a):
        return getattr(d, f)(*a)[0].name

    def make():
        return call("cuMemCreate", F, c.allocation, 0)

    def q_unmap_range():
        a = c.reserve(4 * F)
        hs = [make() for _ in range(4)]
        for i, h in enumerate(hs):
            c.map(a + i * F, F, h)
        c.allow(a, 4 * F)
        [call("cuMemRelease", h) for h in hs]
        return code("cuMemUnmap", a, 4 * F)

    def q_release_then_use():
        a = c.reserve(F)
        h = make()
        c.map(a, F, h)
        call("cuMemRelease", h)
        c.allow(a, F)
        return code("cuMemsetD8", a, 7, F)

    def q_access_part():
        a = c.reserve(2 * F)
        h = make()
        c.map(a, F, h)
        return code("cuMemSetAccess", a, 2 * F, [c._access], 1)

    def q_no_access():
        a = c.reserve(F)
        h = make()
        c.map(a, F, h)
        return code("cuMemsetD8", a, 1, 1)

    def q_map_twice():
        a = c.reserve(F)
        h = make()
        c.map(a, F, h)
        return code("cuMemMap", a, F, 0, make(), 0)

    def q_free_mapped():
        a = c.reserve(F)
        c.map(a, F, make())
        return code("cuMemAddressFree", a, F)

    def q_same_handle_twice():
        a = c.reserve(2 * F)
        h = make()
        c.map(a, F, h)
        return code("cuMemMap", a + F, F, 0, h, 0)

    def q_import_own():
        h = make()
        fd = int(call("cuMemExportToShareableHandle", h, c.handle_type, 0))
        i = call("cuMemImportFromShareableHandle", fd, c.handle_type)
        os.close(fd)
        a = c.reserve(F)
        c.map(a, F, i)
        c.allow(a, F)
        return code("cuMemsetD8", a, 1, F)

    def q_copy_across_registrations():
        from swap_agent.device.memfd import HostMemory

        m = HostMemory("t", 4 * MIB)
        dev = int(call("cuMemAlloc", 4 * MIB))
        r = [code("cuMemHostRegister", m.address, F, 1), code("cuMemHostRegister", m.address + F, F, 1)]
        return r + [
            code("cuMemcpyHtoDAsync", dev, m.address, 4 * MIB, 0),
            code("cuMemcpyHtoDAsync", dev, m.address, F, 0),
            code("cuCtxSynchronize"),
        ]

    def q_register_unaligned_neighbours():
        from swap_agent.device.memfd import HostMemory

        m = HostMemory("t", F)
        return [code("cuMemHostRegister", m.address, 5000, 1), code("cuMemHostRegister", m.address + 5000, 5000, 1)]

    def q_new_memory_is_zero():
        import numpy as np

        a = c.reserve(F)
        h = make()
        c.map(a, F, h)
        c.allow(a, F)
        x = np.empty(F, np.uint8)
        call("cuMemcpyDtoH", x.ctypes.data, a, F)
        return bool(not x.any())

    def q_unmap_while_copying():
        from swap_agent.device.memfd import HostMemory

        n = 256 * MIB if gib >= 1 else 8 * MIB
        m = HostMemory("t", n)
        call("cuMemHostRegister", m.address, n, 1)
        a = c.reserve(n)
        h = call("cuMemCreate", n, c.allocation, 0)
        c.map(a, n, h)
        c.allow(a, n)
        s = call("cuStreamCreate", 1)
        call("cuMemcpyHtoDAsync", a, m.address, n, s)
        t = time.perf_counter()
        r = code("cuMemUnmap", a, n)
        return [r, f"returned after {(time.perf_counter() - t) * 1e3:.1f} ms", code("cuStreamSynchronize", s)]

    found = {}
    for name, f in list(locals().items()):
        if not name.startswith("q_"):
            continue
        r, w = os.pipe()
        pid = -1
        src = f"import sys,json; sys.argv[1:]=[]; sys.path.insert(0,{str(Path(__file__).parent)!r}); import first; first.setup({ROOT!r}); first.ROOT={ROOT!r}; print(json.dumps(first.one_rule({name!r},{gib})))"
        e = (
            subprocess.run([sys.executable, "-c", src], capture_output=True, text=True, timeout=15)
            if ONE is None
            else None
        )
        if name == ONE:
            return f()
        if e is not None:
            found[name[2:]] = (
                json.loads(e.stdout)
                if e.returncode == 0 and e.stdout.strip()
                else f"exit {e.returncode}: {e.stderr.strip()[-200:]}"
            )
    return found


ONE, ROOT = None, ""


def one_rule(name, gib):
    global ONE
    ONE = name
    return rules(gib)


def vmm_cost(gib):
    c, call, d = open_gpu()
    out = {}
    for size in (2 * MIB, 32 * MIB, 128 * MIB, 512 * MIB):
        n = max(1, int(min(gib * GIB, 128 * size) // size))
        t = T()
        for rnd in range(2):
            hs = [t("create", call, "cuMemCreate", size, c.allocation, 0) for _ in range(n)]
            fds = [int(t("export", call, "cuMemExportToShareableHandle", h, c.handle_type, 0)) for h in hs]
            own, a = c.reserve(n * size), c.reserve(n * size)
            for i, h in enumerate(hs):
                t("map own", c.map, own + i * size, size, h)
            t(f"access own, {n} at once", c.allow, own, n * size)
            got = [t("import", call, "cuMemImportFromShareableHandle", f, c.handle_type) for f in fds]
            for f in fds:
                os.close(f)
            for i, h in enumerate(got):
                t("map", c.map, a + i * size, size, h)
            for h in got:
                t("release imported", call, "cuMemRelease", h)
            if rnd:
                for i in range(n):
                    t("access one", c.allow, a + i * size, size)
                for i in range(n):
                    t("unmap one", c.unmap, a + i * size, size)
            else:
                t(f"access, {n} at once", c.allow, a, n * size)
                try:
                    t(f"unmap, {n} at once", c.unmap, a, n * size)
                except Exception as e:
                    out["unmap at once is refused"] = repr(e)
                    for i in range(n):
                        c.unmap(a + i * size, size)
            t("fill 1 frame and wait", lambda: (call("cuMemsetD8Async", own, 0, size, 0), call("cuCtxSynchronize")))
            for i in range(n):
                c.unmap(own + i * size, size)
            for h in hs:
                t("release last", call, "cuMemRelease", h)
            c.free(own, n * size)
            c.free(a, n * size)
        out[f"{size // MIB} MiB x {n}"] = t.out()
    return out


def registered(call, size, kind="memfd"):
    from swap_agent.device.memfd import HostMemory

    m = HostMemory("first", size)
    for off in range(0, size, 512 * MIB):
        call("cuMemHostRegister", m.address + off, min(512 * MIB, size - off), 1)
    return m


def under_copy(gib):
    """Do calls of ours wait for a copy under way on another stream of this process? (docs: "synchronous for most use cases")"""
    c, call, d = open_gpu()
    n = int(gib * GIB) // (512 * MIB) * 512 * MIB or 32 * MIB
    piece = min(n, 512 * MIB)
    m = registered(call, n)
    dev = int(call("cuMemAlloc", n))
    s = call("cuStreamCreateWithPriority", 1, 0)
    F = 32 * MIB
    extra = registered(call, 2 * MIB)
    from swap_agent.device.memfd import HostMemory

    unreg = HostMemory("u", 64 * MIB)

    def copy():
        for off in range(0, n, piece):
            call("cuMemcpyHtoDAsync", dev + off, m.address + off, piece, s)

    copy()
    call("cuStreamSynchronize", s)
    t0 = time.perf_counter()
    copy()
    call("cuStreamSynchronize", s)
    alone = time.perf_counter() - t0
    out = {"copy alone ms": round(alone * 1e3, 1), "GB/s": round(n / alone / 1e9, 1)}
    base = c.reserve(64 * F)
    keep = []
    hs = [call("cuMemCreate", F, c.allocation, 0) for _ in range(8)]
    for i in range(4):
        c.map(base + i * F, F, hs[i])
    c.allow(base, 4 * F)
    s2 = call("cuStreamCreateWithPriority", 1, 0)
    actions = {
        "nothing": lambda: None,
        "cuMemCreate": lambda: keep.append(call("cuMemCreate", F, c.allocation, 0)),
        "cuMemExport": lambda: os.close(int(call("cuMemExportToShareableHandle", hs[0], c.handle_type, 0))),
        "cuMemMap": lambda: c.map(base + 4 * F, F, hs[4]),
        "cuMemSetAccess": lambda: c.allow(base + 4 * F, F),
        "cuMemUnmap": lambda: c.unmap(base + 4 * F, F),
        "cuMemRelease": lambda: call("cuMemRelease", hs[7]),
        "memset on another stream, waited": lambda: (
            call("cuMemsetD8Async", base, 0, F, s2),
            call("cuStreamSynchronize", s2),
        ),
        "2 MiB copy on another stream, waited": lambda: (
            call("cuMemcpyHtoDAsync", base, extra.address, 2 * MIB, s2),
            call("cuStreamSynchronize", s2),
        ),
        "pageable 32 MiB to host": lambda: call("cuMemcpyDtoHAsync", unreg.address, base, F, s2),
        "cuMemHostRegister 64 MiB": lambda: call("cuMemHostRegister", unreg.address, 64 * MIB, 1),
        "cuMemHostUnregister": lambda: call("cuMemHostUnregister", unreg.address),
        "cuMemGetInfo": c.free_and_total_bytes,
        "cuMemAlloc": lambda: keep.append(call("cuMemAlloc", F)),
        "cuMemFree": lambda: call("cuMemFree", keep.pop()),
    }
    for name, f in actions.items():
        call("cuCtxSynchronize")
        t0 = time.perf_counter()
        copy()
        t1 = time.perf_counter()
        try:
            f()
        except Exception as e:
            out[name] = repr(e)[:120]
            call("cuCtxSynchronize")
            continue
        t2 = time.perf_counter()
        call("cuStreamSynchronize", s)
        t3 = time.perf_counter()
        took, whole = t2 - t1, t3 - t0
        out[name] = {
            "call_ms": round(took * 1e3, 2),
            "copy with it ms": round(whole * 1e3, 1),
            "waited for the copy": bool(name != "nothing" and took > 0.7 * alone),
        }
    return out


def host_kinds(gib):
    import mmap

    from swap_agent.device import mmap as mapping

    c, call, d = open_gpu()
    n = int(gib * GIB) // (64 * MIB) * 64 * MIB or 64 * MIB
    dev = int(call("cuMemAlloc", n))
    libc = mapping._libc
    out = {}
    kinds = {
        "memfd, 4 KiB": (False, mmap.MADV_NOHUGEPAGE),
        "memfd, huge advised": (False, mmap.MADV_HUGEPAGE),
        "anonymous, huge advised": (True, mmap.MADV_HUGEPAGE),
    }

    def populate(a, size, threads):
        step = -(-size // threads // (2 * MIB)) * 2 * MIB
        ts = [
            threading.Thread(target=libc.madvise, args=(a + o, min(step, size - o), 23)) for o in range(0, size, step)
        ]
        [x.start() for x in ts]
        [x.join() for x in ts]

    for kind, (anonymous, advice) in kinds.items():
        for threads in (1, 8):
            fd = -1
            a = mapping.reserve(n)
            if anonymous:
                mapping._mmap(a, n, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10, -1)
            else:
                fd = os.memfd_create("k")
                os.ftruncate(fd, n)
                mapping.map_file(fd, a, n)
            libc.madvise(a, n, advice)
            t = time.perf_counter()
            populate(a, n, threads)
            pop = time.perf_counter() - t
            one = {"populate GB/s": round(n / pop / 1e9, 2)}
            if threads == 8:
                for piece in (64 * MIB, 512 * MIB):
                    piece = min(piece, n)
                    ts = []
                    for o in range(0, n, piece):
                        t = time.perf_counter()
                        call("cuMemHostRegister", a + o, min(piece, n - o), 1)
                        ts.append(time.perf_counter() - t)
                    one[f"register {piece // MIB} MiB, ms each"] = [
                        round(x * 1e3, 1) for x in (sorted(ts)[len(ts) // 2], max(ts))
                    ]
                    one[f"register in {piece // MIB} MiB, ms/GiB"] = round(sum(ts) * 1e3 * GIB / n, 1)
                    for chunk in (8 * MIB, 32 * MIB, min(piece, 512 * MIB)):
                        for streams in (1, 2):
                            ss = [call("cuStreamCreate", 1) for _ in range(streams)]
                            best = 0.0
                            for _ in range(3):
                                t = time.perf_counter()
                                for k, o in enumerate(range(0, n, chunk)):
                                    call("cuMemcpyHtoDAsync", dev + o, a + o, min(chunk, n - o), ss[k % streams])
                                [call("cuStreamSynchronize", s) for s in ss]
                                best = max(best, n / (time.perf_counter() - t) / 1e9)
                            one[
                                f"to device, pieces {piece // MIB}, copies {chunk // MIB} MiB, {streams} streams, GB/s"
                            ] = round(best, 2)
                    t = time.perf_counter()
                    for o in range(0, n, piece):
                        call("cuMemHostUnregister", a + o)
                    one[f"unregister in {piece // MIB} MiB, ms/GiB"] = round(
                        (time.perf_counter() - t) * 1e3 * GIB / n, 1
                    )
                t = time.perf_counter()
                call("cuMemcpyHtoD", dev, a, n)
                one["pageable to device GB/s"] = round(n / (time.perf_counter() - t) / 1e9, 2)
                t = time.perf_counter()
                call("cuMemcpyDtoH", a, dev, n)
                one["pageable to host GB/s"] = round(n / (time.perf_counter() - t) / 1e9, 2)
            out[f"{kind}, {threads} threads"] = one
            mapping.unmap(a, n)
            if fd >= 0:
                os.close(fd)
    return out


def order(gib):
    """A swap-in's own calls: exports before the copies, as rank.prepare does, or copies first."""
    c, call, d = open_gpu()
    F = 32 * MIB
    n = max(2, int(gib * GIB) // F)
    m = registered(call, n * F)
    a = c.reserve(n * F)
    hs = [call("cuMemCreate", F, c.allocation, 0) for _ in range(n)]
    for i, h in enumerate(hs):
        c.map(a + i * F, F, h)
    c.allow(a, n * F)
    s = call("cuStreamCreate", 1)

    def copies():
        [call("cuMemcpyHtoDAsync", a + i * F, m.address + i * F, F, s) for i in range(n)]

    def exports():
        [os.close(int(call("cuMemExportToShareableHandle", h, c.handle_type, 0))) for h in hs]

    def wait():
        call("cuStreamSynchronize", s)

    out = {"frames": n}
    for name, fs in {
        "copies only": (copies, wait),
        "exports, then copies": (exports, copies, wait),
        "copies, exports meanwhile": (copies, exports, wait),
    }.items():
        best = 1e9
        for _ in range(4):
            t = time.perf_counter()
            [f() for f in fs]
            best = min(best, time.perf_counter() - t)
        out[name] = {"ms": round(best * 1e3, 1), "GB/s": round(n * F / best / 1e9, 2)}
    return out


def frames_of(c, call, n, F):
    return [call("cuMemCreate", F, c.allocation, 0) for _ in range(n)]


def grant(addresses, c, call, address, handles, F):
    fds = [int(call("cuMemExportToShareableHandle", h, c.handle_type, 0)) for h in handles]
    addresses.map(address, fds, F, touch=True)
    [os.close(f) for f in fds]


def torch_storage(gib):
    import torch

    from vllm_engine.rank import relocate
    from vllm_engine.rank.mapper import CudaMapper

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    dev = torch.device("cuda:0")
    c, call, d = open_gpu()
    F = 32 * MIB
    ad = CudaMapper(0)
    a = ad.reserve(2 * F)
    hs = frames_of(c, call, 2, F)
    grant(ad, c, call, a, hs, F)
    home = relocate.storage_at(a, 2 * F, dev)
    p = torch.nn.Parameter(torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16), requires_grad=False)
    x = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
    want = (x @ p).clone()
    old = p.untyped_storage()
    part = relocate.storage_at(a + 512, old.nbytes(), dev)
    part.copy_(old)
    p.data = relocate._view(part, p)
    got = x @ p
    out = {
        "address kept": home.data_ptr() == a and p.data_ptr() == a + 512,
        "same product": bool(torch.equal(want, got)),
        "across frames": None,
    }
    y = torch.as_tensor(relocate._CudaMemory(a, 2 * F), device=dev)
    y.fill_(3)
    out["across frames"] = int((y == 3).sum()) == 2 * F
    torch.cuda.synchronize()
    ad.vacate([(a, 2 * F)])
    torch.cuda.empty_cache()
    hs2 = frames_of(c, call, 2, F)
    grant(ad, c, call, a, hs2, F)
    y.fill_(5)
    out["after other frames came"] = int((y == 5).sum()) == 2 * F
    f0 = torch.cuda.memory_reserved()
    out["torch counts frames as reserved"] = f0 >= 2 * F
    torch.cuda.set_per_process_memory_fraction(0.01)
    out["fraction is taken"] = True
    return out


def torch_graph_pool(gib):
    """Graphs in scratch: is replay right when scratch comes back as zeros, as 0xFF, or as it was?"""
    import torch

    from vllm_engine.adapter.scratch import Scratch
    from vllm_engine.rank.mapper import CudaMapper

    torch.cuda.init()
    c, call, d = open_gpu()
    F = 32 * MIB
    n = 4
    ad = CudaMapper(0)
    a = ad.reserve(n * F)
    hs = frames_of(c, call, n, F)
    grant(ad, c, call, a, hs, F)
    call("cuMemsetD8", a, 0, n * F)
    scratch = Scratch(a, n * F)
    pool = scratch.memory_pool()
    w = [torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    q = torch.randn(1, 8, 256, 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(32, 2048, device="cuda", dtype=torch.bfloat16)
    kept = {}

    def work(i):
        h = x
        for one in w:
            h = torch.nn.functional.silu(h @ one) / 8
        h = h.float().softmax(-1)
        att = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        top = torch.topk(h, 50).values.sum(-1)
        srt = h.sort(-1).values[:, :16]
        if i not in kept:
            kept[i] = [torch.empty_like(t) for t in (h, att, top, srt)]
        for t, s in zip(kept[i], (h, att, top, srt)):
            t.copy_(s)
        lazily = kept.setdefault(
            "lazy", torch.zeros(1024, device="cuda")
        )  # made inside the first capture, as some backends do
        lazily.add_(1)
        kept[i].append(lazily) if len(kept[i]) == 4 else None

    st = torch.cuda.Stream()
    with torch.cuda.stream(st):
        work(0)
        work(1)
    torch.cuda.synchronize()
    kept.pop("lazy")
    graphs = []
    for i in range(2):
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g, pool=pool.id):
            work(i)
        graphs.append(g)
    torch.cuda.synchronize()
    out = {"scratch after capture": scratch.usage()._asdict(), "use_count": pool.use_count()}

    def replay():
        for g in graphs:
            g.replay()
        torch.cuda.synchronize()
        return [t.clone() for i in range(2) for t in kept[i][:4]]

    first = replay()
    again = replay()
    out["replay is reproducible"] = all(torch.equal(p, r) for p, r in zip(first, again))
    saved = torch.empty(n * F, dtype=torch.uint8)
    call("cuMemcpyDtoH", saved.data_ptr(), a, n * F)
    for name in ("zeros", "0xFF", "as it was"):
        torch.cuda.synchronize()
        ad.vacate([(a, n * F)])
        torch.cuda.empty_cache()
        other = frames_of(c, call, n, F)[::-1]
        grant(ad, c, call, a, other, F)
        if name == "as it was":
            call("cuMemcpyHtoD", a, saved.data_ptr(), n * F)
        else:
            call("cuMemsetD8", a, 255 if name == "0xFF" else 0, n * F)
        call("cuCtxSynchronize")
        try:
            now = replay()
            out["scratch comes back as " + name] = all(torch.equal(p, r) for p, r in zip(first, now))
        except Exception as e:
            out["scratch comes back as " + name] = repr(e)[:200]
            break
        [call("cuMemRelease", h) for h in other]
    out["after"] = scratch.usage()._asdict()
    return out


EXIT = """
import sys; sys.path[:0] = [{root!r}, {root!r} + '/backend', {here!r}]
import first, torch, gc
from vllm_engine.rank.mapper import CudaMapper
from vllm_engine.adapter.scratch import Scratch
torch.cuda.init(); c, call, d = first.open_gpu(); F = 32 << 20; ad = CudaMapper(0); a = ad.reserve(2 * F)
first.grant(ad, c, call, a, first.frames_of(c, call, 2, F), F)
class Holder: pass
h = Holder(); h.scratch = Scratch(a, 2 * F); h.pool = h.scratch.memory_pool()
x = torch.randn(256, 256, device='cuda'); y = x @ x; g = torch.cuda.CUDAGraph()
with torch.cuda.graph(g, pool=h.pool.id): y = x @ x
torch.cuda.synchronize()
{how}
print('ended')
"""


def torch_exit(gib):
    out = {}
    for name, how in {
        "all alive": "",
        "graph, then scratch before pool (as GraphsInFrames is destroyed)": "del y; del g; gc.collect(); del h; gc.collect(); torch.cuda.empty_cache()",
        "pool before the graph": "p = h.pool; del h.pool; del p; gc.collect(); torch.cuda.empty_cache()",
        "frames gone first": "ad.vacate([(a, 2 * F)])",
    }.items():
        e = subprocess.run(
            [sys.executable, "-c", EXIT.format(root=ROOT, here=str(Path(__file__).parent), how=how)],
            capture_output=True,
            text=True,
            timeout=30,
        )
        out[name] = {"exit": e.returncode, "said": (e.stdout + e.stderr)[-300:]}
    return out


def main():
    global ROOT
    p = argparse.ArgumentParser()
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--root", default=str(Path.cwd()))
    p.add_argument("--gib", type=float, default=4)
    p.add_argument("--steps", default=",".join(n for n, _ in STEPS))
    p.add_argument("--limit", type=float, default=200)
    p.add_argument("--one")
    o = p.parse_args()
    ROOT = o.root
    setup(o.root)
    if o.one:
        print(json.dumps(globals()[o.one](o.gib), default=str))
        return
    end = time.monotonic() + o.limit
    for name, limit in STEPS:
        if name not in o.steps.split(","):
            continue
        left = min(limit, end - time.monotonic())
        t = time.monotonic()
        row = {"step": name}
        if left < 3:
            row["error"] = "no time left"
        else:
            c = subprocess.Popen(
                [sys.executable, __file__, "--one", name, "--out", str(o.out), "--root", o.root, "--gib", str(o.gib)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                so, se = c.communicate(timeout=left)
                if c.returncode == 0:
                    row["result"] = json.loads(so.strip().splitlines()[-1])
                else:
                    row["error"] = f"exit {c.returncode}: {se[-1500:]}"
            except subprocess.TimeoutExpired:
                os.killpg(c.pid, signal.SIGKILL)
                c.wait()
                row["error"] = f"took more than {left:.0f} s"
            except Exception:
                row["error"] = traceback.format_exc()[-600:]
        row["took_s"] = round(time.monotonic() - t, 1)
        with o.out.open("a") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())
        print(json.dumps(row)[:2500], flush=True)


if __name__ == "__main__":
    main()
