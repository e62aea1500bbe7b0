"""Shipped recipes and their data; `steer run NAME` finds them here."""
