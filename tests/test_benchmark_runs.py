"""The benchmark of attention to histories: from runs that have ended to its table."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import sequences


def test_attention_is_compared_with_the_mean_over_the_seeds_of_runs_that_ended(tmp_path: Path) -> None:
    for model, aucs in (("din", (0.8, 0.82)), ("mean", (0.79, 0.79))):
        for seed, auc in enumerate(aucs, start=1):
            folder = tmp_path / f"{model}-{seed}" / "run"
            folder.mkdir(parents=True)
            result = {"test_auc": auc, "test_gauc": 0.7, "test_logloss_nats": 0.5}
            (folder / "result.json").write_text(json.dumps(result))
            lines = [{"step": 1}, {"validation_auc": 0.8}, {"validation_auc": 0.83}, {"validation_auc": 0.81}]
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            found = {"seed": seed, **sequences.found_in(folder)}
            assert (found["validation_auc"], found["epochs"]) == (0.83, 3)
            (folder.parent / "found.json").write_text(json.dumps(found))
    lines = sequences.table_of({"sequences": sequences.measure(2, tmp_path, 1, "commit")}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:5] == ["din", "2", "0.81000", "0.01000", "0.8000 0.8200"]
    assert cells[1][:5] == ["mean", "2", "0.79000", "0.00000", "0.7900 0.7900"]
