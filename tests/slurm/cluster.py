"""A Slurm of several nodes on this machine, for `.ci/slurm.sh`'s namespaces."""

import os
import pathlib
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

NODES = {f"n{i}": f"127.0.0.{i + 1}" for i in (1, 2, 3, 4)}
"""Addresses on the loopback interface, by name."""

FIRST_PORT = 17000
KILL_WAIT = 45
"""Seconds; a save may take that long on a busy machine."""

CREDENTIAL_EXPIRES = 65
"""Seconds; Slurm's default is 120."""

CONF = """
ClusterName=heptad
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired, which takes longer than
# KillWait: until then slurmd may still end what has its number.
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait={kill_wait}
SlurmdTimeout=10
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
  """Daemons of Slurm; a context manager.

  Attributes:
    folder: of their files.
  """

  def __init__(self, folder: pathlib.Path, say: Callable[[str], Any] = print):
    """Starts nothing yet.

    Args:
      folder: for configuration, state and logs.
      say: prints a line of the transcript.
    """
    self.folder, self._print = folder, say
    self._begin = time.monotonic()
    self._daemons: dict[str, subprocess.Popen] = {}
    self._over = threading.Event()
    self._watching = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    _loopback(self.folder)
    self._configure()
    self._start("munged", "--foreground", *self._munge())
    _until(lambda: (self.folder / "munge.socket").exists(), 30)
    self._start("slurmctld", "-D", "-c")
    for node in NODES:
      self._start_node(node)
    _until(lambda: self._idle() == len(NODES), 60)
    self.do("sinfo")
    self._watching.start()
    return self

  def __exit__(self, kind, error, trace):
    self._over.set()
    for daemon in reversed(self._daemons.values()):
      daemon.kill()
    for daemon in self._daemons.values():
      daemon.wait()

  def say(self, text: str) -> None:
    """Prints to the transcript, with the seconds since the start."""
    self._print(f"{time.monotonic() - self._begin:6.1f}  {text}")

  def do(self, *command: str) -> str:
    """Runs a command, into the transcript; returns what it prints."""
    self.say(f"$ {' '.join(command)}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in (done.stdout + done.stderr).splitlines():
      self._print(f"        {line}")
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout

  def kill_node(self, node: str) -> None:
    """Kills a node's slurmd and all that it started, as a power cut does."""
    self.say(f"kill -9 of slurmd on {node} and of what it runs")
    self._daemons.pop(node).kill()
    # A step's daemon is no child of slurmd's any more; it has its node's name.
    names = {f"SLURMD_NODENAME={node}".encode(), f"HEPTAD_NODE={node}".encode()}
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
      try:
        if names & set(path.read_bytes().split(b"\0")):
          os.kill(int(path.parent.name), signal.SIGKILL)
      except OSError:
        continue

  def start_node(self, node: str) -> None:
    """Starts a node's slurmd again."""
    self.say(f"slurmd -N {node}")
    self._start_node(node)

  def _configure(self) -> None:
    for name in ("state", *(f"spool-{node}" for node in NODES)):
      (self.folder / name).mkdir()
    key = self.folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    nodes = [
      f"NodeName={node} NodeHostname={host} NodeAddr={address}"
      f" Port={FIRST_PORT + i} CPUs=2 State=UNKNOWN"
      for i, (node, address) in enumerate(NODES.items(), 1)
    ]
    (self.folder / "slurm.conf").write_text(
      CONF.format(
        folder=self.folder,
        host=host,
        port=FIRST_PORT,
        kill_wait=KILL_WAIT,
        expire=CREDENTIAL_EXPIRES,
        nodes="\n".join(nodes),
      )
    )
    (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")

  def _munge(self) -> list[str]:
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid"}
    names |= {"log-file": "log", "seed-file": "seed"}
    files = [f"--{k}={self.folder}/munge.{v}" for k, v in names.items()]
    return ["--force", *files]

  def _start_node(self, node: str) -> None:
    os.environ["HEPTAD_NODE"] = node
    self._start("slurmd", "-D", "-N", node, name=node)
    del os.environ["HEPTAD_NODE"]

  def _start(self, *command: str, name: str | None = None) -> None:
    name = name or command[0]
    with (self.folder / f"{name}.out").open("ab") as out:
      self._daemons[name] = subprocess.Popen(
        command, stdout=out, stderr=out, stdin=subprocess.DEVNULL
      )

  def _idle(self) -> int:
    done = subprocess.run(
      ["sinfo", "--noheader", "--Node", "--format=%T"],
      capture_output=True,
      text=True,
      check=False,
    )
    return done.stdout.split().count("idle")

  def _watch(self) -> None:
    """Says which states of jobs have changed."""
    before: dict[str, str] = {}
    command = ["squeue", "--array", "--noheader", "--format=%i %T %N"]
    while not self._over.wait(0.3):
      done = subprocess.run(
        command, capture_output=True, text=True, check=False
      )
      if done.returncode:
        continue
      now = dict(line.split(" ", 1) for line in done.stdout.splitlines())
      for job in sorted(before.keys() | now.keys()):
        if before.get(job) != now.get(job):
          self.say(f"job {job} {now.get(job, 'has left the queue')}")
      before = now


def _loopback(folder: pathlib.Path) -> None:
  """Gives the namespaces a loopback interface, and its nodes their names."""
  subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
  # Slurm listens by names of AI_ADDRCONFIG, to which 127.0.0.1 does not count.
  for address in NODES.values():
    command = ["ip", "address", "add", f"{address}/8", "dev", "lo"]
    subprocess.run(command, check=True)
  lines = [f"127.0.0.1 localhost {socket.gethostname()}"]
  lines += [f"{address} {node}" for node, address in NODES.items()]
  hosts = folder / "hosts"
  hosts.write_text("\n".join(lines) + "\n")
  subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)


def _until(condition: Callable[[], Any], seconds: float) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "Slurm does not start; see its logs"
    time.sleep(0.1)
