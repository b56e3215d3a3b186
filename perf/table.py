"""Every benchmark there is, with the bars that it answers."""

from math import inf

from perf.benchmark import Bar, Benchmark

RANGES: dict[str, tuple[float, float]] = {
    "busy-poll": (0, 1000),
    "cache-mib": (0, inf),
    "changed": (0, 1),
    "cold": (0, inf),
    "downtime-ms": (1, 1e6),
    "floor-level": (0, 22),
    "iops": (0, inf),
    "lanes": (1, 16),
    "moves": (0, inf),
    "operations": (4, inf),
    "pages-per-s": (0, inf),
    "rounds": (10, inf),
    "seconds": (0.01, inf),
    "zero": (0, 1),
}
"""Least and greatest value of settings that are numbers, by name. Of the others, whole ones are 1
or more, and none is negative."""

BENCHMARKS: dict[str, Benchmark] = {
    "bitmap": Benchmark(
        "perf.benchmarks.bitmap",
        "bitmap scans, one core, against reading it and against numpy",
        settings={"mib": 32},
        quick={"mib": 1},
        bars=(
            Bar(6, "to_indices_of_numpy", 10, "higher"),
            Bar(6, "to_indices_of_read", 0.7, "higher", {"density": 0.0}),
        ),
    ),
    "bitmap-tib": Benchmark(
        "perf.benchmarks.bitmap_tib",
        "register reads while the dirty log of a guest of 1 TiB is read, against one of 1 GiB",
        settings={"gib": 1024, "seconds": 3, "set-every-mib": 0},
        quick={"gib": 16, "seconds": 0.1},
        bars=(Bar(9, "p99_of_small", 2, "lower"),),
    ),
    "pages": Benchmark(
        "perf.benchmarks.pages",
        "digest, encoding and decoding of pages, one core, against memcpy",
        settings={"mib": 256},
        quick={"mib": 4},
        bars=(Bar(5, "encode_unchanged_of_memcpy", 0.5, "higher"),),
    ),
    "trace": Benchmark(
        "perf.benchmarks.trace",
        "wire bytes, against XBZRLE, and time per page of a recorded guest's rounds",
        settings={
            "trace": "",
            "cache-mib": 256,
            "codecs": "lz4+zstd:1+zstd:3+zstd:6+zstd:9",
            "floor-level": 19,
            "floor-mib": 16,
        },
        bars=(
            Bar(4, "wire_of_xbzrle", 0.7, "lower", {"codec": "lz4"}),
            Bar(4, "wire_of_xbzrle", 0.5, "lower", {"codec": "zstd:9"}),
        ),
    ),
    "compression": Benchmark(
        "perf.benchmarks.compression",
        "bytes and time of the codecs, one core, against zstandard's levels and QEMU's stream",
        settings={
            "mib": 128,
            "files": "/usr",
            "codecs": "lz4+zstd:1+zstd:2+zstd:3+zstd:4+zstd:5+zstd:7+zstd:9",
        },
        quick={"mib": 2, "codecs": "lz4+zstd:1"},
    ),
    "link": Benchmark(
        "perf.benchmarks.link",
        "rounds of pages between two processes, against a bare ZeroMQ stream",
        settings={"link": "tcp", "mib": 256, "lanes": 2, "encryption": "none"},
        quick={"mib": 4},
    ),
    "precopy": Benchmark(
        "perf.benchmarks.precopy",
        "rounds of a made-up guest that writes by a rate and a pattern while it is sent",
        settings={
            "link": "tcp",
            "mib": 256,
            "pages-per-s": 10_000,
            "pattern": "hot",
            "changed": 0.1,
            "downtime-ms": 10.0,
            "max-rounds": 30,
            "lanes": 2,
            "codec": "auto",
            "cache-mib": 64,
        },
        quick={"mib": 16, "pages-per-s": 1000},
    ),
    "limits": Benchmark(
        "perf.benchmarks.limits",
        "what the machine allows: memory, codec and digest of one core, bare streams",
        settings={"mib": 256},
        quick={"mib": 4},
    ),
    "copy": Benchmark(
        "perf.benchmarks.copy",
        "a full copy of an image to another process, against QEMU's own and a bare stream",
        settings={
            "mib": 2048,
            "zero": 0.42,
            "files": "/usr",
            "codec": "auto",
            "link": "tcp",
            "peers": "plain+multifd+multifd-zstd",
        },
        quick={"mib": 32, "files": "none", "peers": "multifd"},
        needs=("qemu",),
        bars=(Bar(1, "rate_of_multifd", 2.0, "higher"), Bar(1, "cpu_of_multifd", 0.8, "lower")),
    ),
    "copy-1gbit": Benchmark(
        "perf.benchmarks.copy",
        "the same over a link of 1 Gbit/s between network namespaces",
        settings={
            "mib": 512,
            "zero": 0.42,
            "files": "/usr",
            "codec": "auto",
            "link": "1000",
            "peers": "plain+xbzrle+multifd+multifd-zstd",
        },
        quick={"mib": 16, "files": "none", "peers": "multifd"},
        needs=("qemu", "netns"),
        bars=(Bar(2, "time_of_best_qemu", 0.85, "lower"),),
    ),
    "codec": Benchmark(
        "perf.benchmarks.codec",
        "the codec that lanes choose by themselves, against each fixed one, on several links",
        settings={
            "links": "100+1000+10000+tcp",
            "seconds": 2.0,
            "mib": 512,
            "zero": 0.42,
            "codecs": "none+lz4+zstd:1+zstd:3+zstd:5+zstd:9",
        },
        quick={"links": "1000", "mib": 4, "codecs": "lz4"},
        needs=("netns",),
        bars=(Bar(3, "time_of_best_fixed", 1.15, "lower"),),
    ),
    "gateway": Benchmark(
        "perf.benchmarks.gateway",
        "register reads and posted writes through the gateway, against none",
        settings={"reads": 4000, "writes": 64000, "busy-poll": 100},
        quick={"reads": 200, "writes": 640},
        bars=(
            *(Bar(9, "added_p50", 40, "lower", {"way": way}) for way in ("relayed", "trapped")),
            *(
                Bar(9, "posted_writes", 50_000, "higher", {"way": way})
                for way in ("relayed", "trapped")
            ),
        ),
    ),
    "journal": Benchmark(
        "perf.benchmarks.journal",
        "the register journal: encoded, carried, put in order and decoded, without a device",
        settings={"operations": 200_000},
        quick={"operations": 4000},
        bars=(Bar(10, "all", 1_000_000, "higher"),),
    ),
    "vmm-stream": Benchmark(
        "perf.benchmarks.vmm_stream",
        "QEMU's migration stream read and rewritten, one core, against memcpy and a bare reader",
        settings={"mib": 512, "zero": 0.42, "chunk-kib": 1024},
        quick={"mib": 16},
        needs=("qemu",),
    ),
    "vm": Benchmark(
        "perf.benchmarks.vm",
        "a stock QEMU guest that writes while it is moved, against QEMU's own migration",
        settings={
            "link": "1000",
            "writer": "16",
            "mib": 1024,
            "content": 640,
            "set": 64,
            "files": "/usr",
            "peers": "plain+xbzrle+multifd+multifd-zstd",
            "downtime-ms": 300,
            "settle-s": 4,
            "deadline-s": 300,
        },
        quick={"mib": 256, "content": 32, "set": 8, "files": "none", "peers": "plain"},
        needs=("qemu", "netns"),
        bars=(
            Bar(13, "lanes_share", 0.98, "higher"),
            Bar(14, "time_of_best_qemu", 0.75, "lower", {"link": "100", "writer": "16"}),
            Bar(15, "time_of_best_qemu", 1, "lower", {"link": "1000", "writer": "16"}),
            Bar(15, "wire_of_best_qemu", 0.8, "lower", {"link": "1000", "writer": "16"}),
            Bar(16, "time_of_plain", 1.1, "lower", {"link": "tcp", "writer": "idle"}),
            Bar(17, "downtime_of_best_qemu", 1, "lower", {"link": "1000"}),
        ),
    ),
    "start": Benchmark(
        "perf.benchmarks.start",
        "from starting send and receive to the first page, kernels cached and not",
        settings={"cold": 1, "iops": 0},
        quick={"cold": 0},
        bars=(
            Bar(8, "first_page", 2, "lower", {"cache": "warm"}),
            Bar(8, "first_page", 15, "lower", {"cache": "cold"}),
        ),
    ),
    "memory": Benchmark(
        "perf.benchmarks.memory",
        "what send takes of memory beside the guest's, over a thousand rounds",
        settings={"mib": 256, "cache-mib": 64, "codec": "auto", "rounds": 1000, "dirty": 500},
        quick={"mib": 16, "rounds": 20},
        bars=(Bar(11, "growth", 1, "lower", {"memory": "private"}),),
    ),
    "last-round": Benchmark(
        "perf.benchmarks.last_round",
        "the last round's pages, from the pause until the receiver has applied and proven them",
        settings={
            "link": "tcp",
            "mib": 256,
            "lanes": 2,
            "dirty": 1000,
            "rounds": 40,
            "interval-ms": 100,
        },
        quick={"mib": 8, "dirty": 100, "rounds": 10, "interval-ms": 1},
        bars=(
            *(Bar(7, metric, 5, "lower") for metric in ("applied", "proven")),
            *(Bar(7, metric, 15, "lower", at=0.99) for metric in ("applied", "proven")),
        ),
    ),
    "hardware": Benchmark(
        "perf.benchmarks.hardware",
        "an NVMe controller: accesses, doorbells, walks, dirty pages by queues, downtime",
        settings={
            "where": "vfio-user",
            "entries": "2+16+64+256+1024",
            "reads": 2000,
            "doorbells": 20000,
            "gib": 1,
            "rounds": 20,
            "moves": 1,
        },
        quick={"entries": "2+16", "reads": 50, "doorbells": 640, "rounds": 10, "moves": 0},
    ),
    "slowdown": Benchmark(
        "perf.benchmarks.slowdown",
        "the guest's I/O rate in passthrough, mediated, and with a link that is dead",
        settings={"depth": 1, "iops": 0, "milliseconds": 400, "intervals": 20},
        quick={"milliseconds": 100, "intervals": 2},
        bars=(Bar(12, "dead_of_slow", 0.95, "higher"),),
    ),
}
