#!/bin/sh
# Runs a command beside Slurm, which it installs where it can (Debian, Ubuntu).
#
#   sh .ci/slurm.sh COMMAND...
#
# In namespaces of its own: the loopback interface, names of hosts and processes
# are this command's alone, and nothing of it stays. Where that cannot be, says
# why, and ends with 0.

skip() {
  echo "skipped: $1"
  exit 0
}

[ "$(uname -s)" = Linux ] || skip "Slurm's daemons need Linux"
[ "$(id -u)" = 0 ] || skip "needs root, to install and start Slurm's daemons"
unshare --mount --net --pid --fork true 2>/dev/null \
  || skip "needs the right to make namespaces (CAP_SYS_ADMIN)"
if ! command -v slurmctld slurmd srun munged ip >/dev/null; then
  command -v apt-get >/dev/null \
    || skip "needs slurmctld, slurmd, srun, munged and ip"
  # Does not start the daemons that it brings.
  policy=/usr/sbin/policy-rc.d
  [ -e $policy ] && policy= || { printf 'exit 101\n' >$policy; chmod +x $policy; }
  DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet \
    --no-install-recommends slurmctld slurmd slurm-client munge iproute2
  installed=$?
  [ -z "$policy" ] || rm $policy
  [ $installed = 0 ] || skip "apt-get cannot install Slurm here"
fi
HEPTAD_SLURM=1 exec unshare --mount --net --pid --fork --kill-child --mount-proc "$@"
