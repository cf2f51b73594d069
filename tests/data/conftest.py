import pytest
from synthetic import PEOPLE, jpeg


@pytest.fixture
def lfw_photos() -> dict[str, bytes]:
    return {
        f"{name}/{name}_{number:04d}.jpg": jpeg(person, number)
        for person, (name, count) in enumerate(PEOPLE.items())
        for number in range(1, count + 1)
    }
