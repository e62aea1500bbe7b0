"""Training of stimuli: a small policy writes a hint for each input, and a frozen black box answers under it.

    maximise  E_{z ~ p(. | x)} E_{y ~ box(. | x, z)} R(x, y)  -  c KL(p || p_SFT)

First the policy is fitted to hints out of references (SFT), then by a policy gradient on the reward of the black box's
texts, with the coefficient c under a controller. The optimum is `p*(z | x) ∝ p_SFT(z | x) exp(E_y R / c)`: the *mean*
reward of a hint's texts counts, so several texts of one hint only lower the noise. Whether the black box heeds a hint
at all is measured before anything is trained: many small chat models do not.

Li et al., "Guiding Large Language Models via Directional Stimulus Prompting" (2302.11520).
"""

from steer.train.stimulus.learning import controlled
from steer.train.stimulus.settings import StimulusSettings
from steer.train.stimulus.training import train_stimulus

__all__ = ["StimulusSettings", "controlled", "train_stimulus"]
