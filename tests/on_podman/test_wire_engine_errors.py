"""The wire protocol on Podman: see the file of this name above."""

from test_wire_engine_errors import *
