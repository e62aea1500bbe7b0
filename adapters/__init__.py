"""Engines that steer runs on, one package each; `language` is what token models share."""
