"""What only a host with an NVIDIA GPU can show."""

import pytest

from hive.devices import nvml
from hive.errors import CudaDeviceNotFound, CudaDriverMissing

pytestmark = pytest.mark.gpu


@pytest.fixture
def devices() -> list[nvml.Device]:
    try:
        found = nvml.list_devices()
    except CudaDriverMissing as exc:
        pytest.skip(f"no GPU: {exc.message}")
    if not found:
        pytest.skip("no GPU: the driver lists none")
    return found


def test_a_device_is_known_by_its_number_and_by_its_uuid(devices: list[nvml.Device]) -> None:
    first = devices[0]
    assert first.uuid.startswith("GPU-")
    assert nvml.resolve([f"cuda:{first.index}", first.uuid]) == {
        f"cuda:{first.index}": first.uuid,
        first.uuid: first.uuid,
    }


def test_a_number_beyond_the_last_is_not_replaced_by_another(devices: list[nvml.Device]) -> None:
    beyond = f"cuda:{max(d.index for d in devices) + 1}"
    with pytest.raises(CudaDeviceNotFound, match=beyond):
        nvml.resolve([beyond])
