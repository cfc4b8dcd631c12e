"""What only a host with an NVIDIA GPU can show.

In a process of its own: where this one has loaded the NVML double, it would be asked instead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

TOP = Path(__file__).parents[2]
LOOK = """
import json
import threading
from dataclasses import asdict
from hive.devices import nvml
from hive.errors import CudaDriverMissing, HiveError

driver = nvml.Driver()
try:
    devices = driver.devices()
except CudaDriverMissing as exc:
    print(json.dumps({"none": exc.message}))
    raise SystemExit
names = [name for device in devices for name in (device.id, device.uuid)]
beyond = f"cuda:{max((d.index for d in devices), default=-1) + 1}"
try:
    nvml.resolve(driver, [beyond])
except HiveError as exc:
    refusal = [exc.code, exc.message]
heard = {}
for device in devices:
    listening = driver.xids(device.uuid, threading.Event())
    try:
        heard[device.id] = next(listening)
    except HiveError as exc:
        heard[device.id] = exc.message
    listening.close()
print(json.dumps({
    "heard": heard,
    "devices": [asdict(device) for device in devices],
    "resolved": {name: device.uuid for name, device in nvml.resolve(driver, names).items()},
    "readings": [asdict(driver.read(device.uuid)) for device in devices],
    "beyond": beyond,
    "refusal": refusal,
}))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What hive sees of this host's GPUs."""
    env = {key: value for key, value in os.environ.items() if key != "NVML_DOUBLE"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=TOP,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    seen: dict[str, Any] = json.loads(done.stdout)
    if not seen.get("devices"):
        pytest.skip(f"no GPU: {seen.get('none', 'the driver lists none')}")
    return seen


def test_a_device_is_known_by_its_number_and_by_its_uuid(seen: dict[str, Any]) -> None:
    for device in seen["devices"]:
        assert device["uuid"].startswith("GPU-")
        assert seen["resolved"][f"cuda:{device['index']}"] == device["uuid"]
        assert seen["resolved"][device["uuid"]] == device["uuid"]


def test_a_number_beyond_the_last_is_not_replaced_by_another(seen: dict[str, Any]) -> None:
    code, message = seen["refusal"]
    assert code == "CUDA_DEVICE_NOT_FOUND"
    assert seen["beyond"] in message
    assert seen["devices"][0]["uuid"] in message


def test_a_device_can_be_read(seen: dict[str, Any]) -> None:
    for reading in seen["readings"]:
        assert reading["total"] > 2**30
        assert 0 < reading["free"] <= reading["total"]
        assert 0 < reading["temperature_c"] < 110


def test_xid_events_are_listened_to_or_the_driver_says_why_not(seen: dict[str, Any]) -> None:
    assert seen["heard"].keys() == {f"cuda:{device['index']}" for device in seen["devices"]}
    for said in seen["heard"].values():  # None: it listened for a while, and none came
        assert said is None or "refuses to tell Xid events" in said, said
