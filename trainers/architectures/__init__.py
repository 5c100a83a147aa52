"""The room of architectures: see README.md. Its names can be listed without importing torch."""

from saescale.storage.registry import Room

ARCHITECTURES = Room("saescale.trainers.architectures", "architecture", marker="forward")
