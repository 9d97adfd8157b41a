"""Defenses side by side: each trained or put around a net, attacked knowingly, and found to hold or not."""

from sparring.defending.defend import Defended, defend

__all__ = ["Defended", "defend"]
