"""What the simulator reads: traces, drawn or of a file, cluster descriptions, flags; and what it says of bad ones."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from support.optional import need

from swap_agent.cli import simulate_flags
from swap_agent.cli.main import main
from swap_agent.errors import InvalidUsage
from swap_agent.simulate import cluster as clusters
from swap_agent.simulate import policies, seeds
from swap_agent.simulate import trace as traces
from swap_agent.simulate.trace import BURST_S, TraceSpec
from swap_agent.units import GIB, MIB

MODELS = ("x", "y", "z")
AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:01.009930+00:00,2162,5
2024-05-10 00:00:00.009930+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,Conversation log
"""
BURSTGPT_2 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log
"""


def written(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_azure_files_name_no_model_so_models_are_drawn(tmp_path: Path) -> None:
    trace = traces.read(written(tmp_path, AZURE_2023), MODELS, seed=1, zipf=1.0)
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 4.314579], abs=1e-5)
    assert trace.prompt_tokens.tolist() == [374, 396]
    assert trace.output_tokens.tolist() == [44, 109]
    many = AZURE_2023 + "2023-11-16 18:15:51.0,1,1\n" * 2000
    drawn = traces.read(written(tmp_path, many), MODELS, seed=3, zipf=1.0)
    shares = np.sort(np.bincount(drawn.model) / len(drawn))[::-1]
    assert shares == pytest.approx(traces.zipf_shares(1.0, 3), abs=0.05)


def test_rows_out_of_order_are_sorted_and_offsets_understood(tmp_path: Path) -> None:
    trace = traces.read(written(tmp_path, AZURE_2024), MODELS, seed=1, zipf=1.0)
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 1.0])
    assert trace.prompt_tokens.tolist() == [2399, 2162]


def test_burstgpt_files_name_models_and_their_failures_are_left_out_and_counted(tmp_path: Path) -> None:
    trace = traces.read(written(tmp_path, BURSTGPT), ("GPT-4", "ChatGPT"), seed=1, zipf=1.0)
    assert [trace.models[place] for place in trace.model] == ["ChatGPT", "GPT-4"]
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert (len(trace), trace.left_out) == (2, 1)
    assert len(traces.read(written(tmp_path, BURSTGPT_2), MODELS, seed=1, zipf=1.0)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 1: the columns TIMESTAMP,ContextTokens,GeneratedTokens or Timestamp,Model,"),
        ("", "line 1: the columns"),
        (AZURE_2023 + "2023-11-16 18:15:51,x,3\n", "line 4, ContextTokens: 'x' is not a count of tokens"),
        (AZURE_2023 + "2023-11-16 18:15:51,3,-1\n", "line 4, GeneratedTokens: '-1' is not a count"),
        (AZURE_2023 + "yesterday,3,1\n", "line 4, TIMESTAMP: 'yesterday' is not a time"),
        (BURSTGPT + "nan,GPT-4,1,1,2,x\n", "line 5, Timestamp: 'nan' is not a time"),
        (AZURE_2023 + "2023-11-16 18:15:51,3\n", "line 4: 2 columns where the first line has 3"),
        (BURSTGPT.replace("GPT-4", "x"), "line 2, Model: 'ChatGPT' is no model of the cluster, others are"),
        (AZURE_2023.partition("\n")[0], "has no requests"),
    ],
)
def test_bad_traces_name_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidUsage) as caught:
        traces.read(written(tmp_path, text), MODELS, seed=1, zipf=1.0)
    assert message in str(caught.value)
    assert "trace.csv" in str(caught.value)


def test_a_drawn_trace_has_the_rate_popularity_and_bursts_asked_for() -> None:
    names = [f"m{number}" for number in range(10)]
    spec = TraceSpec(seed=5, hours=48, per_s=2.0, zipf=1.0, burst=10.0)
    trace, again = traces.draw(spec, names), traces.draw(spec, names)
    assert all(np.array_equal(getattr(trace, c), getattr(again, c)) for c in ("arrival_s", "model", "prompt_tokens"))
    assert not np.array_equal(traces.draw(TraceSpec(seed=6, hours=48, per_s=2.0), names).model[:100], trace.model[:100])
    assert len(trace) / (48 * 3600) == pytest.approx(2.0, rel=0.05)
    assert np.all(np.diff(trace.arrival_s) >= 0)
    counts = np.sort(np.bincount(trace.model))[::-1]
    assert counts / len(trace) == pytest.approx(traces.zipf_shares(1.0, 10), rel=0.15)
    # Counts per burst length vary far more than those of a plain Poisson process, whose variance is the mean.
    own = trace.arrival_s[trace.model == np.bincount(trace.model).argmax()]
    per_minute = np.bincount((own / BURST_S).astype(int))
    assert per_minute.var() > 10 * per_minute.mean()


def test_a_daily_swing_is_lowest_at_the_start() -> None:
    trace = traces.draw(TraceSpec(seed=1, hours=24, per_s=2.0, daily=0.8), MODELS)
    by_quarter = np.bincount((trace.arrival_s / 21600).astype(int))
    assert by_quarter[1:3].sum() > 2 * (by_quarter[0] + by_quarter[3])
    assert len(trace) / 86400 == pytest.approx(2.0, rel=0.1)


CLUSTER = """
frame = "2MiB"
[[device]]
count = 2
memory = "10GiB"
link_per_s = "1GiB"
[[model]]
name = "small"
copies = 3
weights = "1GiB"
kv = "512MiB"
prefill_tokens_per_s = 1000
decode_tokens_per_s = 50.5
keep_alive = "-1"
"""


def test_a_cluster_is_read_from_toml_and_json(tmp_path: Path) -> None:
    cluster = clusters.read(written(tmp_path, CLUSTER, "c.toml"))
    assert [(device.name, device.frames) for device in cluster.devices] == [("gpu:0", 5120), ("gpu:1", 5120)]
    assert cluster.links == {"gpu:0": GIB, "gpu:1": GIB}
    assert list(cluster.models) == ["small-1", "small-2", "small-3"]
    model = cluster.models["small-2"]
    assert (model.frames(2 * MIB), model.keep_alive, model.decode_tokens_per_s) == ((512, 256), None, 50.5)
    as_json = written(tmp_path, json.dumps(tomllib.loads(CLUSTER)), "c.json")
    assert clusters.read(as_json) == cluster


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kv =", "kvs =", "model 1: kvs: no such field; did you mean kv?"),
        ('"1GiB"\n[', '"1GB"\n[', "device 1: link_per_s: '1GB' uses a unit that is ambiguous"),
        ("50.5", '"fast"', "model 1: decode_tokens_per_s: 'fast' is not a number"),
        ("copies = 3", "copies = 0", "model 1: copies: 0 has to be above 0"),
        ("copies = 3", "copies = 1.5", "model 1: copies: 1.5 is not a whole number"),
        ('weights = "1GiB"', "", "model 1: weights: missing"),
        ("[[model]]", "[model]", "model: a list of one or more is expected"),
        ('weights = "1GiB"', 'weights = "11GiB"', "model 1 (small): weights and kv take 11.5 GiB on each of 1 devices"),
        ("copies = 3", 'pinned = "yes"', "model 1: pinned: 'yes' is neither true nor false"),
        ("count = 2", "count = ", "(at line 4, column 9)"),
    ],
)
def test_bad_clusters_name_entry_and_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CLUSTER
    with pytest.raises(InvalidUsage) as caught:
        clusters.read(written(tmp_path, CLUSTER.replace(old, new, 1), "c.toml"))
    assert message in str(caught.value)
    assert "c.toml" in str(caught.value)


def test_the_verb_prints_json_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--cluster", str(written(tmp_path, CLUSTER, "c.toml")), "--trace", str(written(tmp_path, BURSTGPT))]
    assert main(["simulate", *flags, "--policy", "default,always-on", "--json", "--out", str(out)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["policies"]) == ["default", "always-on"]
    assert answer["policies"]["default"]["answered"] == answer["trace"]["requests"] == 2
    assert answer["trace"]["left_out"] == 1
    assert json.loads((out / "simulate.json").read_text()) == answer


def test_the_table_has_a_row_for_each_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--cluster", str(written(tmp_path, CLUSTER, "c.toml")), "--trace", str(written(tmp_path, BURSTGPT))]
    assert main(["simulate", *flags]) == 0
    out = capsys.readouterr().out
    assert "1 rows of the trace have no output and were left out" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert set(simulate_flags.POLICIES) <= set(rows)
    # prompts of 472 and 417 tokens at 1,000 a second; engines of their own take 90 s to start
    assert rows["always-on"][1:7:2] == ["0.444", "0.466", "0.471"]
    assert rows["scale-from-zero"][1:3] == ["90.4", "s"]


def test_seeds_give_a_row_each_and_what_they_come_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = str(written(tmp_path, CLUSTER.replace("10GiB", "2GiB"), "c.toml"))
    flags = ["--cluster", cluster, "--hours", "0.05", "--zipf", "0.8-1.2", "--burst", "5-20", "--seeds", "3-5"]
    assert main(["simulate", *flags, "--policy", "default,lru", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in answer["seeds"]] == [3, 4, 5]
    assert all(0.8 <= row["zipf"] <= 1.2 and 5 <= row["burst"] <= 20 for row in answer["seeds"])
    assert len({row["burst"] for row in answer["seeds"]}) == 3
    assert main(["simulate", *flags, "--policy", "default,lru"]) == 0
    assert "default: p99 over lru's: median" in capsys.readouterr().out


def test_a_policy_is_measured_against_lru_on_each_seed() -> None:
    rows = [{"p99_s": {"default": own, "lru": other}} for own, other in ((1.0, 2.0), (9.0, 10.0), (3.0, 2.0))]
    ratios = {"median_ratio": 0.9, "best_ratio": 0.5, "worst_ratio": 1.5}
    assert seeds.against(rows, ["default", "lru"], "lru") == {"default": ratios}
    assert seeds.against(rows, ["default"], "lru") == {}


@pytest.mark.parametrize("flags", [[], ["--seeds", "1-2"]])
def test_without_matplotlib_there_is_one_line_instead_of_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    cluster = str(written(tmp_path, CLUSTER, "c.toml"))
    assert main(["simulate", "--cluster", cluster, "--hours", "0.01", "--out", str(tmp_path / "out"), *flags]) == 0
    assert capsys.readouterr().err == "triton-swap: no plot: matplotlib is not installed; pip install matplotlib\n"
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]


@pytest.mark.parametrize(("flags", "name"), [([], "simulate.png"), (["--seeds", "1-2"], "seeds.png")])
def test_plots_are_drawn(tmp_path: Path, flags: list[str], name: str) -> None:
    need("matplotlib")
    cluster = str(written(tmp_path, CLUSTER, "c.toml"))
    assert main(["simulate", "--cluster", cluster, "--hours", "0.01", "--out", str(tmp_path), *flags]) == 0
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trace", "nowhere.csv"], "--trace nowhere.csv: No such file or directory"),
        (["--policy", "best"], "--policy best: no such policy; there are default, lru"),
        (["--rate", "1", "--requests", "5"], "--rate and --requests say the same"),
        (["--hours", "0.0001", "--rate", "0.001"], "no request was drawn: raise --hours or --rate"),
        (["--trace", "x.csv", "--seeds", "1-2"], "--seeds is for drawn traces, not for --trace"),
    ],
)
def test_bad_flags_get_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value"), [("--zipf", "1.2-0.8"), ("--hours", "0"), ("--daily", "2"), ("--seed", "x"), ("--seeds", "9-3")]
)
def test_flags_that_cannot_be_read_are_wrong_usage(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", flag, value])
    assert caught.value.code == 2
    assert f"{value!r} is n" in capsys.readouterr().err


def test_the_parser_knows_every_policy_and_loads_nothing_heavy() -> None:
    assert tuple(policies.POLICIES) == simulate_flags.POLICIES
    script = "import sys, swap_agent.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "rich", "httpx", "aiohttp", "msgspec", "torch", "vllm"} & set(loaded)
    assert "swap_agent.cli.verbs" in loaded, "the parser of every verb is what is loaded"
