"""The detector suite passes a sound detector, and catches each seeded bug."""

import pytest

from sagellm.core.protocols import DetectorSpec, Device, Link, TopologyFragment
from sagellm.core.protocols.testing import check_detector


class Sysfs:
    """Reads PCI class files, and nothing else."""

    def detect(self, ctx):
        devices, warnings = [], []
        for folder in self.folders(ctx.root):
            try:
                text = (folder / "class").read_text()
            except (OSError, UnicodeDecodeError) as e:
                warnings.append(f"{folder.name}: {e}")
                continue
            if text.startswith("0x0302"):
                devices.append(Device(id=folder.name, kind="gpu"))
        return TopologyFragment("toy", tuple(devices), warnings=tuple(warnings))

    def folders(self, root):
        try:
            return sorted((root / "sys/bus/pci/devices").iterdir())
        except OSError:
            return []


class Raises(Sysfs):
    def folders(self, root):
        return list((root / "sys/bus/pci/devices").iterdir())


class RaisesOnTool(Sysfs):
    def detect(self, ctx):
        ctx.run(["toy-smi"], 1.0)
        return super().detect(ctx)


class RunsAnyway(Sysfs):
    def detect(self, ctx):
        try:
            ctx.run(["toy-smi"], 1.0)
        except OSError:
            pass
        return super().detect(ctx)


class IgnoresRoot(Sysfs):
    def detect(self, ctx):
        return TopologyFragment("toy", (Device(id="0000:17:00.0", kind="gpu"),))


class Indexes(Sysfs):
    def detect(self, ctx):
        return TopologyFragment("toy", (Device(id="0", kind="gpu"),))


class GuessesSpeed(Sysfs):
    def detect(self, ctx):
        link = Link("a", "b", "pcie", bandwidth_bytes_per_s=0.0)
        return TopologyFragment("toy", links=(link,))


class GuessesNode(Sysfs):
    def detect(self, ctx):
        return TopologyFragment("toy", (Device(id="net:a", kind="nic", numa_nodes=(-1,)),))


class GivesNothing(Sysfs):
    def detect(self, ctx):
        return None


class Fickle(Sysfs):
    count = 0

    def detect(self, ctx):
        self.count += 1
        return TopologyFragment("toy", (Device(id=f"net:{self.count}", kind="nic"),))


class Repeats(Sysfs):
    def detect(self, ctx):
        return TopologyFragment("toy", (Device(id="net:a", kind="nic"),) * 2)


def test_a_sound_detector_passes():
    report = check_detector(Sysfs)

    assert report.ok(reference=True), report.text()
    assert check_detector(DetectorSpec("toy", 60, load=Sysfs)).ok()


@pytest.mark.parametrize(
    "bug",
    [Raises, RaisesOnTool, RunsAnyway, IgnoresRoot, Indexes, GuessesSpeed, GuessesNode,
     GivesNothing, Fickle, Repeats],
)  # fmt: skip
def test_a_seeded_bug_is_caught(bug):
    assert not check_detector(bug).ok()
