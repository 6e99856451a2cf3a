# SPDX-License-Identifier: Apache-2.0
"""Several processes that are one run. No JAX in those that watch, but to ask a cluster.

    supervisor 0 ---- supervisor 1 ---- ...      TCP, to the coordinator's port
        |                  |
     process 0          process 1                a socket pair; these run JAX

JAX ends a process in C++ when another one is lost, and a computation that waits for a
lost process waits for good. So each process is watched by the one that it was launched
as, which has no JAX in it: it can always say what happened, and end the other.
"""
