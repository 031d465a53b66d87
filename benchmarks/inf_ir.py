"""A million synthetic records through the ``datasets`` builder: time, and the peak memory of the process that builds.

python benchmarks/inf_ir.py [--records N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_COLUMNS = ("query_positive", "query_negative", "instruction_positive", "instruction_negative")
_PASSAGES = ("document", "hard_negative_document_1", "hard_negative_document_2")
_SHARD = 50_000


def write_records(folder: Path, count: int) -> None:
    """Shards as ``inf-ir build`` writes them: queries of 6 words, instructions of 15, passages of 60."""
    words = [f"word{number}" for number in range(5000)]
    draw = random.Random(0)
    for shard, start in enumerate(range(0, count, _SHARD)):
        numbers = range(start, min(start + _SHARD, count))
        columns: dict[str, list[str]] = {"id": [str(n) for n in numbers], "instruction_type": ["length"] * len(numbers)}
        for name in (*_COLUMNS, *_PASSAGES):
            length = 60 if name in _PASSAGES else 15 if name.startswith("instruction") else 6
            columns[name] = [f"{n} {' '.join(draw.choices(words, k=length))}" for n in numbers]
        pq.write_table(pa.table(columns), folder / f"train-{shard:05d}.parquet")


def peak_mib() -> float:
    """Peak resident memory of this process (``ru_maxrss`` would count the process that started it)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def build(folder: str, cache: str) -> None:
    """Run the builder here and print what it took, as JSON."""
    from dataset_builder.inf_ir import InFIR

    imported = peak_mib()
    started = time.perf_counter()
    builder = InFIR(config_name="default", data_dir=folder, cache_dir=cache)
    builder.download_and_prepare()
    built = builder.as_dataset()
    seconds = time.perf_counter() - started
    records = sum(len(split) for split in built.values())
    report = {"records": records, "seconds": seconds, "peak_mib": peak_mib(), "imports_mib": imported}
    print("REPORT", json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build(*arguments.build)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "records"
        folder.mkdir()
        write_records(folder, arguments.records)
        mib = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        command = [sys.executable, __file__, "--build", str(folder), str(Path(temporary) / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.split("REPORT ")[1]) | {"parquet_mib": mib, "machine": platform.machine()}
    print(
        f"{report['records']:,} records ({mib:,.0f} MiB of Parquet): {report['seconds'] / 60:.1f} minutes, peak memory "
        f"{report['peak_mib']:,.0f} MiB (after the imports: {report['imports_mib']:,.0f} MiB)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
