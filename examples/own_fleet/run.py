"""What a run will cost a fleet of one's own, then the run, and the two beside each other."""

import fedrank
from fedrank import config
from fedrank.forecast import forecast

found = forecast(config.load("own_fleet.yaml"))
for kind in found["kinds"]:
    print(f"{kind['kind']:7} {kind['device_seconds']:.3f} s and {kind['device_joules']:.2f} J for a client's round")
run = fedrank.run("own_fleet.yaml", out="runs/own_fleet")
print(f"{'':16}{'forecast':>12}{'ledger':>12}")
for name in ("clock_seconds", "device_joules", "bytes_up", "bytes_down"):
    print(f"{name:16}{found['run'][name]:12.6g}{run.summary[name]:12.6g}")
