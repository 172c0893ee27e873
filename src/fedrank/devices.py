"""Device presets and their power modes: by published figures where there are any.

Rates. A preset's compute rate is its peak in float32 times one utilisation, 0.3: no device trains at its peak. Of
published figures, large-model training used 21 % (GPT-3), 30 % (MT-NLG), 33 % (Gopher) and 46 % (PaLM) of its
accelerators' peak (Chowdhery et al., 2022, arXiv:2204.02311, table 3). That 0.3 holds on small devices and small
batches too is our assumption, and one's own devices are better measured (`engine.fleet.csv`).

Peaks, from cores and clocks at 2 FLOP per core and cycle where no peak in float32 is published:

- jetson-tx2: 256 Pascal cores at 1.30 GHz, 8 GB (NVIDIA: 1.33 TFLOPS in half precision, twice the rate of single).
  Power modes Max-N, Max-P and Max-Q with the GPU at 1300, 1120 and 850 MHz; Max-P is 15 W, Max-Q 7.5 W (NVIDIA's
  developer guides). Max-N has no budget: its watts are our assumption.
- jetson-xavier-nx: 384 Volta cores at 1100 MHz, 8 GB (data sheet DA-09366). Modes of 20, 15 and 10 W with the GPU at
  1100, 1100 and 800 MHz (Jetson Linux developer guide).
- jetson-agx-xavier: 512 Volta cores at 1377 MHz, 32 GB. Modes MAXN, 30, 15 and 10 W with the GPU at 1377, 900, 670
  and 520 MHz, the last on half of its cores (the same guide). MAXN's watts are our assumption.
- jetson-orin-nano: 1024 Ampere cores at 625 MHz, 8 GB, 15 and 7 W (NVIDIA's product page); at 7 W 408 MHz and
  half of the cores (Jetson Linux developer guide).
- jetson-agx-orin: 5.3 TFLOPS in float32 (NVIDIA's technical brief), 64 GB, up to 60 W; modes of 50, 30 and 15 W
  with the GPU at 816, 612 and 408 of 1300 MHz, the last two on four and three eighths of its cores (the same guide).
- raspberry-pi-5: four Cortex-A76 cores at 2.4 GHz (product brief) with two 128-bit pipes each, 16 FLOP per core and
  cycle; 8 GB. Its GPU is not counted.
- phone: 1.2 TFLOPS and 8 GB, our assumption for the GPU of a high-end phone of about 2020.
- laptop: 2.6 TFLOPS (Apple's announcement of the M1, 2020), 16 GB.
- workstation: 38.7 TFLOPS, 48 GB, 300 W of the card alone (data sheet of the NVIDIA RTX A6000).
- gpu-server: 67 TFLOPS in float32, 80 GB, 700 W of the card alone (data sheet of the NVIDIA H100 SXM).

Our assumptions throughout: the links (Wi-Fi at some distance for boards, mobile and home connections for phone and
laptop, wires for the rest), idle watts, all watts of the Raspberry Pi, the phone and the laptop, the hosts' share in
those of workstation and server, and the LoRA ranks. Memory is the whole of the device; the system's share is not taken off.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedrank.protocol import Device

UTILISATION = 0.3  # of the peak
MEGABIT = 125_000.0  # bytes


def _preset(
    kind: str, rank: int, peak: float, gigabytes: float, up: float, down: float, idle: float, busy: float
) -> Device:
    """peak: FLOP/s. up, down: megabits per second. idle, busy: watts."""
    return Device(
        "", 0, kind, rank, None, UTILISATION * peak, gigabytes * 1e9, up * MEGABIT, down * MEGABIT, idle, busy
    )


PRESETS: Mapping[str, Device] = {
    device.kind: device
    for device in (
        _preset("jetson-tx2", 4, 256 * 2 * 1.30e9, 8.0, 20.0, 20.0, 3.0, 20.0),
        _preset("jetson-xavier-nx", 4, 384 * 2 * 1.10e9, 8.0, 20.0, 20.0, 4.0, 20.0),
        _preset("jetson-agx-xavier", 8, 512 * 2 * 1.377e9, 32.0, 20.0, 20.0, 8.0, 45.0),
        _preset("jetson-orin-nano", 8, 1024 * 2 * 0.625e9, 8.0, 20.0, 20.0, 4.0, 15.0),
        _preset("jetson-agx-orin", 16, 5.3e12, 64.0, 20.0, 20.0, 10.0, 60.0),
        _preset("raspberry-pi-5", 2, 4 * 16 * 2.4e9, 8.0, 20.0, 20.0, 3.0, 9.0),
        _preset("phone", 4, 1.2e12, 8.0, 10.0, 50.0, 1.0, 5.0),
        _preset("laptop", 8, 2.6e12, 16.0, 20.0, 100.0, 5.0, 25.0),
        _preset("workstation", 32, 38.7e12, 48.0, 1000.0, 1000.0, 60.0, 400.0),
        _preset("gpu-server", 64, 67e12, 80.0, 10_000.0, 10_000.0, 200.0, 1000.0),
    )
}


@dataclass(frozen=True)
class Mode:
    """A power mode. speed: its share of the preset's compute rate."""

    name: str
    speed: float
    busy_watts: float


MODES: Mapping[str, tuple[Mode, ...]] = {
    "jetson-tx2": (Mode("Max-N", 1.0, 20.0), Mode("Max-P", 1120 / 1300, 15.0), Mode("Max-Q", 850 / 1300, 7.5)),
    "jetson-xavier-nx": (Mode("20 W", 1.0, 20.0), Mode("15 W", 1.0, 15.0), Mode("10 W", 800 / 1100, 10.0)),
    "jetson-agx-xavier": (
        Mode("MAXN", 1.0, 45.0), Mode("30 W", 900 / 1377, 30.0), Mode("15 W", 670 / 1377, 15.0),
        Mode("10 W", 520 / 1377 / 2, 10.0),
    ),
    "jetson-orin-nano": (Mode("15 W", 1.0, 15.0), Mode("7 W", 408 / 625 / 2, 7.0)),
    "jetson-agx-orin": (
        Mode("MAXN", 1.0, 60.0), Mode("50 W", 816 / 1300, 50.0), Mode("30 W", 612 / 1300 * 4 / 8, 30.0),
        Mode("15 W", 408 / 1300 * 3 / 8, 15.0),
    ),
}  # fmt: skip
