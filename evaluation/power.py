"""Power, clocks and temperature: NVML on servers, INA3221 and INA238 on Jetson, RAPL on Intel and AMD processors."""

import threading
import time
from pathlib import Path
from typing import Any

_SYSTEM = Path("/sys")
_EVERY = 0.02  # seconds between two readings


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def rails(system: Path = _SYSTEM) -> list[tuple[str, tuple[Path, ...]]]:
    """The input rails of a Jetson's power monitors: a name, and the files whose product is the power.

    INA3221 gives millivolts and milliamperes of three channels, INA238 microwatts. Only the rail that feeds the board counts:
    VDD_IN, or one whose label contains "total". Without such a rail, all rails count.
    """
    found: list[tuple[str, tuple[Path, ...]]] = []
    for monitor in sorted(system.glob("class/hwmon/hwmon*")):
        try:
            kind = (monitor / "name").read_text().strip()
        except OSError:
            continue
        if kind == "ina3221":
            for label in sorted(monitor.glob("in*_label")):
                channel = label.name.removeprefix("in").removesuffix("_label")
                files = (monitor / f"in{channel}_input", monitor / f"curr{channel}_input")
                if all(file.exists() for file in files):
                    found.append((label.read_text().strip(), files))
        elif kind == "ina238" and (monitor / "power1_input").exists():
            found.append(("ina238", (monitor / "power1_input",)))
    whole = [rail for rail in found if rail[0].upper() in ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN") or "total" in rail[0].lower()]
    return whole or found


def nvpmodel(root: Path = Path("/")) -> str | None:
    """The power mode of a Jetson, from the status file of `nvpmodel`; None on other machines."""
    try:
        return (root / "var/lib/nvpmodel/status").read_text().strip()
    except OSError:
        return None


def gpu_state(index: int = 0) -> dict[str, Any]:
    """Name, clocks (MHz), power (W), temperature (Celsius) and used memory (MiB) of a GPU; empty if NVML does not answer."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        state = {
            "gpu": pynvml.nvmlDeviceGetName(gpu),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
            "gpu_memory_mb": pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**20,
        }
    except pynvml.NVMLError:
        return {}
    return state


class EnergyMeter:
    """Measures the energy between entering and leaving, in joules; `joules` is None if the machine has no meter.

    An energy counter (NVML, RAPL) is read twice. A power monitor is read every 20 ms, and its readings are summed.
    """

    def __init__(self, on_gpu: bool, system: Path = _SYSTEM) -> None:
        self.on_gpu, self.system = on_gpu, system
        self.source: str | None = None
        self.joules: float | None = None
        self._rails = rails(system)
        self._begin: float | None = None

    @property
    def measures(self) -> bool:
        """Whether the machine has a meter; this is known after entering."""
        return bool(self._rails) or self._begin is not None

    def _counter(self) -> float | None:
        if self.on_gpu:
            try:
                import pynvml

                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByIndex(0)
                energy = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            except ImportError:
                return None
            except pynvml.NVMLError:
                return None
            self.source = "nvml"
            return float(energy)
        packages = sorted(self.system.glob("class/powercap/intel-rapl:?"))
        packages = [zone for zone in packages if _text(zone / "name").startswith("package")]  # psys includes them
        values = [_number(package / "energy_uj") for package in packages]
        known = [value for value in values if value is not None]
        if not known:
            return None
        self.source = "rapl"
        return sum(known) / 1e6

    def watts(self) -> float | None:
        """The present power of the board in watts; None if it cannot be read."""
        total, some = 0.0, False
        for _, files in self._rails:
            values = [_number(file) for file in files]
            if all(value is not None for value in values):
                some = True
                product = 1.0
                for value in values:
                    product *= value or 0.0
                total += product / 1e6  # mV x mA, or microwatts
        return total if some else None

    def __enter__(self) -> "EnergyMeter":
        self._begin = self._counter() if not self._rails else None
        self._sum, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if self._rails else None
        if self._thread:
            self.source = "ina"
            self._thread.start()
        return self

    def _watch(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(_EVERY):
            now = time.perf_counter()
            self._sum += (self.watts() or 0.0) * (now - last)
            last = now

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._stop.set()
            self._thread.join()
            self.joules = self._sum
        elif self._begin is not None:
            end = self._counter()
            # RAPL's counter overflows; such a reading is dropped.
            self.joules = end - self._begin if end is not None and end >= self._begin else None
