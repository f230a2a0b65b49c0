"""A sweep's folder as points leave it, without training: for what only reads."""

import json
from pathlib import Path


def write_point(sweep: Path, number: int, params: dict[str, str], *, state: str | None = "done", **values) -> Path:
    """Writes one point; `values`: metric, ptq, size, packed, bops, latency, bits, verified, curve."""
    folder = sweep / "points" / str(number)
    (folder / ".hydra").mkdir(parents=True)
    record = {"number": number, "params": params, "command": [], "state": state, "error": values.get("error")}
    (folder / "point.json").write_text(json.dumps(record))
    lines = [f"seed: 0\nmodel: {{lr: 0.1}}\nrun_dir: {folder}\nquant:\n  weight:\n    bits: {values.get('bits', 4)}\n"]
    (folder / ".hydra" / "config.yaml").write_text("".join(lines))
    curve = values.get("curve", [0.3, 0.6])
    (folder / "csv").mkdir()
    rows = [f"{epoch},{value},{epoch * 10 + 9}," for epoch, value in enumerate(curve)]
    rows.append(f",,{len(curve) * 10 - 1},0.01")
    (folder / "csv" / "metrics.csv").write_text("\n".join(["epoch,val/acc,step,scale/fc1", *rows]) + "\n")
    bits = values.get("bits", 4)
    row = {"params": 100, "weight_bits": bits, "macs": 1000}
    audit = {"bops": values.get("bops", 1000), "rows": [row]}
    (folder / "audit.json").write_text(json.dumps(audit))
    if state == "done":
        _report(folder, values, bits)
    return folder


def _report(folder: Path, values: dict, bits: int) -> None:
    layer = {"type": "Linear", "act_bits": 8, "weight_sqnr_db": 20.0, "act_sqnr_db": None, "macs": 1000, "params": 100}
    layers = [layer | {"name": name, "weight_bits": bits} for name in ("fc1", "</script>fc2")]
    stages = {
        "float": {"metric": 0.95, "latency_ms": 0.5},
        "ptq": {"metric": values.get("ptq", 0.5)},
        "qat": {"metric": values["metric"]},
        "exported": {
            "metric": values["metric"],
            "bytes": values.get("size", 1000),
            "latency_ms": values.get("latency", 0.25),
        },
    }
    report = {
        "name": "x", "metric": "test/acc", "higher_is_better": True, "stages": stages, "layers": layers,
        "packed_bytes": values.get("packed", 500), "bops": values.get("bops", 1000),
        "verify": {"passed": values.get("verified", True)},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))


def write_sweep(folder: Path) -> Path:
    """Four points: 0 and 2 are on the front, 1 is dominated, 3 failed."""
    folder.mkdir(parents=True, exist_ok=True)
    definition = {"kind": "grid", "objectives": {"metric": "max", "packed": "min"}}
    (folder / "sweep.json").write_text(json.dumps(definition))
    write_point(folder, 0, {"quant.weight.bits": "2"}, metric=0.80, bits=2, packed=300, bops=500, ptq=0.2)
    write_point(folder, 1, {"quant.weight.bits": "4"}, metric=0.75, bits=4, packed=500, bops=1000)
    write_point(folder, 2, {"quant.weight.bits": "8"}, metric=0.94, bits=8, packed=900, bops=2000, verified=False)
    write_point(folder, 3, {"quant.weight.bits": "1"}, state="failed", error="out of memory")
    return folder
