"""Which runs of a comparison are taken for finished."""

from __future__ import annotations

import json

from clipo_ds.compare import is_whole


def test_a_run_without_its_last_evaluation_is_not_whole(tmp_path):
    def evaluated(*steps: int) -> bool:
        rows = [{"step": step, "data": data} for step in steps for data in ("near", "far")]
        (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return is_whole(tmp_path, 60)

    (tmp_path / "metrics.jsonl").write_text('{"step": 60}\n')
    for name in ("config.yaml", "ds_config.json"):
        (tmp_path / name).write_text("{}")
    assert not is_whole(tmp_path, 60)
    assert not evaluated(0, 20, 40)
    assert evaluated(0, 20, 40, 60)
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 40, "data": "another"}\n')
    assert not is_whole(tmp_path, 60)
