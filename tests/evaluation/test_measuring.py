"""Latency, energy and the audit."""

import itertools
import time

import numpy as np
import pytest

from evaluation import audit, latency, power


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(str(content))


def clocked(monkeypatch, *durations):
    """A clock that only calls move; each call of the step takes the next duration."""
    now, todo = [0.0], itertools.cycle(durations)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def step(_):
        now[0] += next(todo)

    return step


def test_percentiles_and_their_intervals():
    draw = np.random.default_rng(0)
    blocks = tuple(draw.exponential(0.002, (50, 2)) + 0.001 for _ in range(30))
    timing = latency.Timing(blocks)
    every = np.concatenate(blocks) * 1e3
    assert timing.calls == 1500
    for step in (0, 1):
        for q in (50, 95, 99):
            found = timing.percentile(q, step)
            assert found.value == pytest.approx(np.percentile(every[:, step], q))
            assert found.low < found.value < found.high
    assert timing.percentile(99).value > timing.percentile(95).value > timing.percentile(50).value
    assert timing.width() < latency.Timing(blocks[:8]).width() * 1.05


def test_warm_up_ends_when_calls_get_no_faster(monkeypatch):
    slow = [0.1 / (n + 1) for n in range(30)]
    now, todo = [0.0], itertools.chain(slow, itertools.repeat(slow[-1]))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def step(_):
        now[0] += next(todo)

    calls = latency.warm_up([step], seconds=60)
    assert 30 < calls < 100
    steady = clocked(monkeypatch, 0.01)
    assert latency.warm_up([steady], seconds=60) == 5


def test_timing_ends_early_when_the_median_is_known(monkeypatch):
    ours, theirs = latency.in_turns([[clocked(monkeypatch, 0.004)]] * 2, seconds=100)
    assert len(ours.blocks) == len(theirs.blocks) == 16  # 20 calls a block
    assert ours.calls >= latency.LEAST_CALLS
    assert ours.percentile(50).value == pytest.approx(4)
    assert ours.width() < latency.NARROW


def test_timing_ends_at_the_cap_when_the_median_stays_unknown(monkeypatch):
    draw = np.random.default_rng(0)
    wild = clocked(monkeypatch, *draw.uniform(0.001, 0.2, 997))
    (timing,) = latency.in_turns([[wild]], seconds=6)
    assert timing.width() > latency.NARROW
    assert 8 <= len(timing.blocks) < 120


def test_speed_is_compared_turn_by_turn():
    draw = np.random.default_rng(0)
    disturbed = draw.uniform(1, 5, 20)  # the machine is slower in some turns, for both
    ours = latency.Timing(tuple(np.full((9, 1), 0.002 * d) for d in disturbed))
    theirs = latency.Timing(tuple(np.full((9, 1), 0.005 * d) for d in disturbed))
    found = latency.speedup(ours, theirs)
    assert found.value == found.low == found.high == pytest.approx(2.5)


def test_steps_are_told_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(seconds, result):
        def step(value):
            now[0] += seconds
            return (value, result)

        return step

    seen = []
    assert latency.once([taking(1, "a"), taking(2, "b"), seen.append]) == [1, 2, 0]
    assert seen == [((None, "a"), "b")]


# --- energy ----------------------------------------------------------------------------------------------------------------


def test_an_orins_board_rail_is_read(tmp_path):
    monitor = tmp_path / "class/hwmon/hwmon3"
    write(monitor, name="ina3221\n", in1_label="VDD_IN\n", in1_input=5000, curr1_input=3000)
    write(monitor, in2_label="VDD_CPU_GPU_CV\n", in2_input=5000, curr2_input=1000)
    write(monitor, in3_label="VDD_SOC\n")  # without its inputs: an unused channel
    write(tmp_path / "class/hwmon/hwmon0", name="coretemp\n")
    assert [name for name, _ in power.rails(tmp_path)] == ["VDD_IN"]
    assert power.EnergyMeter(True, tmp_path).watts() == pytest.approx(15)


def test_rails_add_up_where_none_is_the_boards(tmp_path):
    write(tmp_path / "class/hwmon/hwmon1", name="ina3221", in1_label="GPU", in1_input=19000, curr1_input=1000)
    write(tmp_path / "class/hwmon/hwmon2", name="ina238", power1_input=6_000_000)
    assert power.EnergyMeter(True, tmp_path).watts() == pytest.approx(25)


def test_power_is_summed_over_time(tmp_path):
    write(tmp_path / "class/hwmon/hwmon2", name="ina238", power1_input=10_000_000)
    with power.EnergyMeter(False, tmp_path) as meter:
        started = time.perf_counter()
        time.sleep(0.3)
        seconds = time.perf_counter() - started
    assert meter.source == "ina"
    assert 0.5 * 10 * seconds < meter.joules < 1.2 * 10 * seconds


def test_a_counter_of_energy_is_read_twice(tmp_path):
    package = tmp_path / "class/powercap/intel-rapl:0"
    write(package, name="package-0", energy_uj=5_000_000)
    write(tmp_path / "class/powercap/intel-rapl:1", name="psys", energy_uj=9_000_000)
    with power.EnergyMeter(False, tmp_path) as meter:
        write(package, energy_uj=7_500_000)
        write(tmp_path / "class/powercap/intel-rapl:1", energy_uj=99_000_000)  # the platform holds the package once more
    assert (meter.source, meter.joules) == ("rapl", pytest.approx(2.5))
    with power.EnergyMeter(False, tmp_path) as meter:
        write(package, energy_uj=100)  # it ran over
    assert meter.joules is None


def test_where_nothing_measures_there_are_no_joules(tmp_path):
    with power.EnergyMeter(False, tmp_path) as meter:
        pass
    assert meter.joules is None
    assert meter.watts() is None
    assert power.nvpmodel(tmp_path) is None
    write(tmp_path / "var/lib/nvpmodel", status="pmode:0000 fmode:quiet\n")
    assert power.nvpmodel(tmp_path) == "pmode:0000 fmode:quiet"


# --- audit -----------------------------------------------------------------------------------------------------------------

LAYERS = [
    {"name": "a", "precision": "int8", "macs": 900, "us": 10.0},
    {"name": "b", "precision": "fp32", "macs": 100, "us": 25.0, "reason": "no INT8 kernel for ConvTranspose"},
    {"name": "c", "precision": "fp32", "macs": 0, "us": 5.0},
]


def test_shares_are_of_layers_macs_and_time():
    assert audit.shares(LAYERS) == {"int8": 0.9, "fp32": 0.1}
    assert audit.shares(LAYERS, "layers") == {"int8": 0.5, "fp32": 0.5}
    assert audit.shares(LAYERS, "time") == {"fp32": 0.75, "int8": 0.25}
    assert audit.label(audit.shares(LAYERS)) == "int8 90%, fp32 10%"
    assert [layer["name"] for layer in audit.fallen(LAYERS)] == ["b"]
    quantized = [{**layer, "quantized": True} for layer in LAYERS]
    assert [layer["name"] for layer in audit.unmet(quantized)] == ["b", "c"], "a layer without weights, too"
    assert audit.unmet([{**layer, "quantized": False} for layer in LAYERS]) == [], (
        "what the file has in float was not asked for"
    )
    assert audit.unmet(LAYERS) is None, "where no record says what is quantized, nothing was checked"
    assert audit.fallen(LAYERS[1:]) == [], "nothing fell back in an engine that is FP32"
    with pytest.raises(ValueError, match="nothing to audit"):
        audit.shares(LAYERS[2:])
    assert audit.shares([{"precision": "fp32", "macs": 1}], "time") == {}
