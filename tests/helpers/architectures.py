"""Lists of architectures for which a build can contain code, and the code that each device runs for them."""

# Compute capabilities, as ten times the major version plus the minor version.
DEVICES = [80, 86, 89, 90, 100, 103, 120, 121]
# For each list, the architecture of the code that each device runs.
LISTS = {
    "8.0+PTX": dict.fromkeys(DEVICES, 80),
    "8.0+PTX 9.0a": {80: 80, 86: 80, 89: 80, 90: 90, 100: 80, 103: 80, 120: 80, 121: 80},
    "8.0 8.6 8.9 9.0a 10.0 12.0+PTX": {80: 80, 86: 86, 89: 89, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120},
}

# Every pair of a device and the code that it may run.
PAIRS = sorted({(device, code) for devices in LISTS.values() for device, code in devices.items()})
