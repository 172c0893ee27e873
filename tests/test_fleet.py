"""Devices: the presets are sane, kinds are dealt out in their shares, rounds change rates by address only."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedrank import devices, fleet
from fedrank.config import ConfigError, FleetSettings
from fedrank.devices import MODES, PRESETS
from fedrank.fleet import Fleet, build, shares
from fedrank.protocol import Device

CLIENTS = {f"c{at}": 10 + at for at in range(100)}
THIRDS = {"laptop": 1, "phone": 1, "jetson-agx-orin": 1}


def made(seed: int = 0, clients: dict[str, int] = CLIENTS, **settings: object) -> Fleet:
    return build(FleetSettings(**{"devices": THIRDS, **settings}), clients, seed)


# ---- presets


def test_every_kind_that_was_asked_for_is_there():
    assert set(PRESETS) == {
        "jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier", "jetson-orin-nano", "jetson-agx-orin", "raspberry-pi-5",
        "phone", "laptop", "workstation", "gpu-server",
    }  # fmt: skip
    for kind, device in PRESETS.items():
        assert (device.id, device.examples, device.kind) == ("", 0, kind)
        assert device.rank is not None
        assert 0 < device.idle_watts < device.busy_watts
        assert min(device.memory_bytes, device.up_bytes_per_second) > 0
        assert device.up_bytes_per_second <= device.down_bytes_per_second
        assert f"- {kind}: " in str(devices.__doc__)


def test_published_figures():
    """Peaks in float32, times the one utilisation; watts and memory as the makers give them."""
    peaks = {"jetson-tx2": 0.666e12, "jetson-agx-xavier": 1.41e12, "jetson-agx-orin": 5.3e12, "raspberry-pi-5": 153.6e9,
             "workstation": 38.7e12, "gpu-server": 67e12}  # fmt: skip
    for kind, peak in peaks.items():
        assert PRESETS[kind].flops_per_second == pytest.approx(0.3 * peak, rel=2e-3)
    assert [PRESETS[kind].memory_bytes / 1e9 for kind in ("jetson-tx2", "jetson-agx-orin", "gpu-server")] == [8, 64, 80]
    assert {mode.name: mode.busy_watts for mode in MODES["jetson-xavier-nx"]} == {"20 W": 20, "15 W": 15, "10 W": 10}


def test_modes_trade_speed_for_watts():
    assert set(MODES) == {kind for kind in PRESETS if kind.startswith("jetson")}
    for kind, modes in MODES.items():
        assert modes[0].speed == 1.0
        assert modes[0].busy_watts == PRESETS[kind].busy_watts
        assert [mode.speed for mode in modes] == sorted((mode.speed for mode in modes), reverse=True)
        watts = [mode.busy_watts for mode in modes]
        assert watts == sorted(watts, reverse=True)
        assert len(set(watts)) == len(watts)


# ---- who has what


def kinds(found: Fleet) -> dict[str, int]:
    return dict(Counter(device.kind for device in found.devices.values()))


def test_kinds_are_dealt_out_in_their_shares():
    """Of three thirds of a hundred the odd one goes to the kind of the lowest rank."""
    assert kinds(made()) == {"laptop": 33, "phone": 34, "jetson-agx-orin": 33}
    assert kinds(made(ranks={"jetson-agx-orin": 1})) == {"laptop": 33, "phone": 33, "jetson-agx-orin": 34}
    assert kinds(made(devices={"laptop": 30, "phone": 40, "gpu-server": 10})) == {"laptop": 38, "phone": 50, "gpu-server": 12}  # fmt: skip
    assert kinds(made(devices={"laptop": 0.999, "phone": 0.001})) == {"laptop": 100}


def test_shares_are_largest_remainders():
    assert shares([1.0, 1.0, 1.0], 100, [8, 4, 2]) == [33, 33, 34]
    assert shares([1.0, 1.0, 1.0], 101, [8, 4, None]) == [34, 34, 33]
    assert shares([0.5, 0.3, 0.2], 10, [1, 1, 1]) == [5, 3, 2]
    assert shares([0.45, 0.37, 0.18], 10, [1, 1, 1]) == [4, 4, 2]  # of 4.5, 3.7 and 1.8
    assert shares([0.1] * 10, 3, [1] * 10) == [1, 1, 1, *[0] * 7]
    for count in range(40):
        assert sum(shares([0.17, 0.53, 0.3], count, [None, 1, 2])) == count


def test_who_has_what_hangs_on_the_seed_alone():
    one = {client: device.kind for client, device in made().devices.items()}
    assert one == {client: device.kind for client, device in made(clients=dict.fromkeys(CLIENTS, 3)).devices.items()}
    assert one == {client: device.kind for client, device in made(jitter=0.5, links=10).devices.items()}
    other = {client: device.kind for client, device in made(seed=1).devices.items()}
    assert one != other
    assert Counter(one.values()) == Counter(other.values())
    order = list(one.values())
    assert order != sorted(order)


def test_devices_carry_their_clients():
    found = made(links=100.0, ranks={"phone": 3})
    for client, device in found.devices.items():
        preset = PRESETS[device.kind]
        rank = 3 if device.kind == "phone" else preset.rank
        links = {way: 100 * getattr(preset, way) for way in ("up_bytes_per_second", "down_bytes_per_second")}
        assert device == replace(preset, id=client, examples=CLIENTS[client], rank=rank, **links)


def test_without_a_fleet_all_are_of_one_nominal_kind():
    found = build(None, CLIENTS, 0)
    laptop = replace(PRESETS["laptop"], rank=None, memory_bytes=0.0)
    assert found.devices == {client: replace(laptop, id=client, examples=rows) for client, rows in CLIENTS.items()}
    assert all(found.at(client, round) == device for round in (1, 7) for client, device in found.devices.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": {"jetson-tx3": 1}}, r"engine.fleet.devices: no device kind 'jetson-tx3'; did you mean 'jetson-tx2'\?"),
        ({"ranks": {"gpu-server": 1}}, r"engine.fleet.ranks: no device kind 'gpu-server' \(known: laptop, phone"),
        ({"ranks": {"lap-top": 1}}, r"engine.fleet.ranks: no device kind 'lap-top'; did you mean 'laptop'\?"),
    ],
)  # fmt: skip
def test_a_kind_that_is_not_there_is_answered_with_the_nearest(settings, message):
    with pytest.raises(ConfigError, match=message):
        made(**settings)


@pytest.mark.parametrize("settings", [{"devices": {}}, {"csv": "devices.csv"}, {"jitter": -1}, {"redraw": -1},
                                      {"links": 0}, {"devices": {"laptop": 0}}, {"ranks": {"laptop": 0}}])  # fmt: skip
def test_settings_that_say_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=r"greater|less|give one of devices"):
        FleetSettings(**{"devices": THIRDS, **settings})


# ---- rounds


def rates(found: Fleet, round: int) -> dict[str, tuple[float, float]]:
    """Each client's factor on its compute rate and on its links."""
    result = {}
    for client, device in found.devices.items():
        now = found.at(client, round)
        down = now.down_bytes_per_second / device.down_bytes_per_second
        assert now.up_bytes_per_second / device.up_bytes_per_second == pytest.approx(down)
        result[client] = (now.flops_per_second / device.flops_per_second, down)
    return result


def test_without_jitter_a_laptop_is_always_itself():
    found = made(devices={"laptop": 1})
    assert all(found.at(client, round) == found.devices[client] for client in CLIENTS for round in (1, 2, 30))


def test_jitter_is_lognormal_and_new_in_every_round():
    found = made(devices={"laptop": 1}, jitter=0.4)
    drawn = np.log([list(rates(found, round).values()) for round in range(1, 41)])  # (rounds, clients, 2)
    assert np.median(drawn, axis=(0, 1)) == pytest.approx(0, abs=0.03)
    assert np.std(drawn, axis=(0, 1)) == pytest.approx(0.4, rel=0.05)
    compute, link = drawn[..., 0].ravel(), drawn[..., 1].ravel()
    assert abs(np.corrcoef(compute, link)[0, 1]) < 0.05
    assert abs(np.corrcoef(drawn[:-1, :, 0].ravel(), drawn[1:, :, 0].ravel())[0, 1]) < 0.05
    assert rates(found, 3) == rates(made(devices={"laptop": 1}, jitter=0.4), 3)
    assert rates(found, 3) != rates(made(seed=1, devices={"laptop": 1}, jitter=0.4), 3)


def test_the_wildest_jitter_leaves_no_rate_at_zero(monkeypatch):
    class Low:
        def standard_normal(self, count: int) -> list[float]:
            return [-9.0] * count

    found = made(devices={"laptop": 1}, jitter=3.0)
    monkeypatch.setattr(fleet, "rng", lambda *address: Low())
    drawn = found.at(next(iter(CLIENTS)), 1)
    assert drawn.flops_per_second == pytest.approx(1e6 * found.devices[drawn.id].flops_per_second)
    assert drawn.up_bytes_per_second > 0


def test_jitter_of_one_client_hangs_on_no_other():
    few = {client: rows for client, rows in CLIENTS.items() if client in ("c3", "c70")}
    whole, some = (made(devices={"laptop": 1}, jitter=0.4, clients=clients) for clients in (CLIENTS, few))
    assert [whole.at(client, 5) for client in few] == [some.at(client, 5) for client in few]


def modes(found: Fleet, round: int) -> list[float]:
    return [found.at(client, round).busy_watts for client in found.devices]


def test_power_modes_are_drawn_once_or_anew():
    once, anew = (made(devices={"jetson-tx2": 1}, redraw=redraw) for redraw in (0, 5))
    assert set(modes(once, 1)) == {20.0, 15.0, 7.5}
    assert modes(once, 1) == modes(once, 1000)
    assert modes(anew, 1) == modes(anew, 5) == modes(once, 1)
    assert modes(anew, 5) != modes(anew, 6) == modes(anew, 10)
    for client in once.devices:
        now = once.at(client, 1)
        (mode,) = [mode for mode in MODES["jetson-tx2"] if mode.busy_watts == now.busy_watts]
        assert now.flops_per_second == once.devices[client].flops_per_second * mode.speed
        assert now.idle_watts == once.devices[client].idle_watts


def test_factors_are_rounded_so_that_machines_agree():
    found = made(devices={"laptop": 1}, jitter=0.4)
    for _, link in rates(found, 1).values():
        assert link * 1e6 == pytest.approx(round(link * 1e6), abs=1e-6)


# ---- one's own devices

HEADER = "kind,count,client,rank,gigaflops_per_second,memory_gigabytes,up_megabits_per_second,down_megabits_per_second,idle_watts,busy_watts"
FEW = {"c0": 5, "c1": 6, "c2": 7, "c3": 8}


def own(tmp_path: Path, *lines: str, header: str = HEADER, clients: dict[str, int] = FEW, **more: object) -> Fleet:
    path = tmp_path / "devices.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return build(FleetSettings(csv=str(path), **more), clients, 0)


def test_devices_from_a_file(tmp_path):
    found = own(tmp_path, "mine,1,,4,250,8,8,16,2,12.5", "theirs,3,,,1000,32,80,800,20,95", links=2.0)
    assert kinds(found) == {"mine": 1, "theirs": 3}
    (mine,) = [device for device in found.devices.values() if device.kind == "mine"]
    assert mine == Device(mine.id, FEW[mine.id], "mine", 4, None, 250e9, 8e9, 2e6, 4e6, 2.0, 12.5)
    assert {device.rank for device in found.devices.values() if device.kind == "theirs"} == {None}


def test_a_row_may_name_its_client(tmp_path):
    found = own(tmp_path, "desk,,c2,,250,8,8,16,2,12", "tab,,,,100,4,8,16,1,6", ranks={"desk": 9})
    assert {client: device.kind for client, device in found.devices.items()} == {"c0": "tab", "c1": "tab", "c2": "desk", "c3": "tab"}  # fmt: skip
    assert found.devices["c2"].rank == 9


def test_a_preset_s_name_in_a_file_brings_no_power_modes(tmp_path):
    found = own(tmp_path, "jetson-tx2,,,,250,8,8,16,2,12")
    assert all(found.at(client, round) == found.devices[client] for client in FEW for round in (1, 2, 3))
    with pytest.raises(ValueError, match="redraw draws the presets' power modes"):
        own(tmp_path, "jetson-tx2,,,,250,8,8,16,2,12", redraw=1)


def test_optional_columns_may_be_left_out(tmp_path):
    header = "kind,gigaflops_per_second,memory_gigabytes,up_megabits_per_second,down_megabits_per_second,idle_watts,busy_watts"
    assert kinds(own(tmp_path, "a,1,1,1,1,1,1", "b,1,1,1,1,1,1", header=header)) == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,1,,,250,8,8,16,2,12", "b,1,,,fast,8,8,16,2,12"], r"devices.csv:3: gigaflops_per_second: it must be a number above 0, got 'fast'"),
        (["a,1,,,250,8,0,16,2,12"], r"devices.csv:2: up_megabits_per_second: it must be a number above 0, got '0'"),
        (["a,1,,,250,8,inf,16,2,12"], r"devices.csv:2: up_megabits_per_second: .* got 'inf'"),
        (["a,1,,2.5,250,8,8,16,2,12"], r"devices.csv:2: rank: it must be a whole number, got '2.5'"),
        (["a,-1,,,250,8,8,16,2,12"], r"devices.csv:2: count: it must be a number above 0, got '-1'"),
        ([",1,,,250,8,8,16,2,12"], r"devices.csv:2: kind: it is empty"),
        (["a,1,,,250,8,8,16,2"], r"devices.csv:2: this line has not as many cells"),
        (["a,1,,,250,8,8,16,2,12,9"], r"devices.csv:2: this line has not as many cells"),
        (["a,,c9,,250,8,8,16,2,12"], r"devices.csv:2: client: 'c9' is none of this run's; did you mean 'c3'\?|devices.csv:2: client: 'c9' is none"),
        (["a,,c1,,250,8,8,16,2,12", "a,,c1,,250,8,8,16,2,12"], r"devices.csv:3: client: 'c1' has a device already"),
        (["a,3,c1,,250,8,8,16,2,12"], r"devices.csv:2: count: a device of one client has no share"),
        (["a,,,,250,8,8,16,20,12"], r"devices.csv:2: idle_watts: 20 is more than busy_watts, 12"),
        (["a,,c1,,250,8,8,16,2,12"], r"no row is left for client 'c0'"),
        ([], r"devices.csv:2: no devices"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named_by_line_and_column(lines, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        own(tmp_path, *lines)


def test_columns_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"devices.csv:1: unknown column 'watts_idle'; did you mean 'idle_watts'\?"):
        own(tmp_path, header=HEADER.replace("idle_watts", "watts_idle"))
    with pytest.raises(ConfigError, match=r"devices.csv:1: column 'busy_watts' is missing"):
        own(tmp_path, header=HEADER.removesuffix(",busy_watts"))
    with pytest.raises(ConfigError, match=r"engine.fleet.csv: .*nowhere.csv: No such file"):
        build(FleetSettings(csv=str(tmp_path / "nowhere.csv")), FEW, 0)
