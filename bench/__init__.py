"""Willi, nginx mail and HAProxy side by side, on this machine: `make bench`."""
