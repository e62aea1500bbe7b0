"""Training of rewards: linear heads on frozen features of a language model.

    pairs    mean log(1 + exp(margin - w . (z+ - z-))) + l2/2 |w|^2       (Bradley-Terry, convex, no bias)
    binary   mean u_i log(1 + exp(-y_i (w . z_i + b))) + l2/2 |w|^2        (y_i = +-1, weights u_i)
    ratings  |y_k - Z w_k - b_k|^2 + penalty |w_k|^2, each attribute k alone, rows without it left out (ridge)

z are the states after one block at the end of the reply, standardised over the training rows. States are read once;
objectives, penalties and members are then tried in seconds. Members of an ensemble differ by what they see (rows drawn
with replacement, or a random half of the dimensions): a convex head has one optimum, whatever its seed.

Coste et al., "Reward model ensembles help mitigate overoptimization" (2310.02743); Wang et al., ArmoRM (2406.12845).

Letters: `B` rows, `K` attributes, `D` width, `M` members.
"""

from steer.train.reward.heads import bradley_terry, log_loss, prior_correction, ridge
from steer.train.reward.training import RewardSettings, train_reward

__all__ = ["RewardSettings", "bradley_terry", "log_loss", "prior_correction", "ridge", "train_reward"]
