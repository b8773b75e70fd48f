"""Willi, an SMTP proxy for MX hosts: each session goes to the upstream that is responsible for its first recipient."""

VERSION = "2.0.0.dev0"
