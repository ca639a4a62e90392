# SPDX-License-Identifier: Apache-2.0
"""chasquid among other mail software: Postfix, Exim, Dovecot, msmtp, swaks, systemd.

Every test starts what it needs on high ports of 127.0.0.1, each program wholly in a
directory of its own, and stops it again. Nothing leaves the machine: chasquid asks the
name server of the test.

    tools.py    waiting, ports, certificates, letters: what everything here stands on
    peers.py    the programs that serve: name server, Postfix, Exim, Dovecot, smtp-sink
    clients.py  the programs that send: swaks, msmtp, smtp-source
    server.py   chasquid itself, as a process that can be killed and restarted

They need root and Debian's packages; `.ci/run` installs these. Where one is missing, its
tests are skipped, and with CI=true in the environment they fail instead.
"""
