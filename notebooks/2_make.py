# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 2. Make adversarial samples
#
# **What you will see.** A network that reads digits well, and three ways to fool it: a change of every pixel so
# small that you read on while the network does not (FGSM); noise that is nothing to you and a "2" to the network;
# and a "2" that the network calls an "8" with 99.99 %. Every confidence is that of the image as an 8-bit file would
# store it.

# %%
import sparring  # before torch: see docs/decisions/003

# isort: split
import pictures
import torch
from pictures import Strip, said, share

from sparring.attacks.ddn import DDN
from sparring.attacks.fooling import Fooling
from sparring.data import available

data = sparring.load("mnist" if available("mnist") else "digits")
checkpoint = sparring.train("conv", data, steps=1000 if data.name == "mnist" else 500)
net, test = checkpoint.net, data.test
print(f"conv reads {share(checkpoint.card['accuracy'])} of the test images of {data.name}")

# %% [markdown]
# ## One step: the fast gradient sign method
#
# Training moves the weights against the gradient of the loss. An attacker keeps the weights and moves the
# **image**, along the gradient. In one step, with every pixel allowed to change by at most $\varepsilon$, the loss
# rises most (to first order) by
#
# $$ x' = x + \varepsilon \; \mathrm{sign}\, \nabla_x L(f(x), y) $$
#
# (Goodfellow, Shlens, Szegedy 2015, arXiv:1412.6572). `Linf(eps)` is the rule of the game, the *threat model*: all
# images within $\varepsilon$ of the original in every pixel, with pixels in [0, 1].

# %%
eps = 0.1
rows = test.take(500)
found = sparring.attack(net, rows.x, rows.y, "fgsm", sparring.Linf(eps), eight_bit=True)
fell = found.found & ~found.clean  # read right when untouched, wrong after the attack

some = fell.nonzero().squeeze(1)[:6]
x, best = rows.x[some], found.best[some]
pictures.strips(
    Strip("original", x, said(found.clean_label[some], found.clean_confidence[some]), colour=pictures.BLUE),
    Strip(f"change\n× {1 / eps:.0f}", (best - x) / eps, signed=True),
    Strip("result", best, said(found.label[some], found.confidence[some]), colour=pictures.ORANGE),
)

# %% [markdown]
# Where the change is white the gradient points out of [0, 1]: a black pixel cannot get any blacker.
#
# Is any change of that size enough? No: the direction does it. The same step with signs drawn at random:

# %%
signs = torch.randint(0, 2, rows.x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
noisy = (rows.x + eps * signs).clamp(0, 1)
random = 1 - (net(noisy).argmax(1) == rows.y)[~found.clean].double().mean().item()
print(f"of the images read right, FGSM fools {share(found.success_rate)}, and random signs {share(random)}")
assert found.success_rate > 3 * random

# %% [markdown]
# ## Noise that is a "2" to the network
#
# Nobody said that the image must look like something. Start from noise and go downhill on the distance between what
# the network says, $y(x)$, and what it should say, $y_{goal}$ (a one for the goal, else zeros):
#
# $$ C = \tfrac12 \, \lVert y_{goal} - y(x) \rVert^2 $$
#
# This is training's backpropagation, but taken one layer further, to the derivative with respect to the pixels. (On
# images that are noise to a person: Nguyen, Yosinski, Clune 2015, arXiv:1412.1897.) The cost as it stands can
# stall: its gradient goes to zero where the network is sure of something else. `loss="tempered"`, the default,
# divides the logits by a temperature while the goal trails. Both may take 500 steps, and stop at 99.99 %.

# %%
goal = torch.arange(10)
grey = torch.full((10, *test.x.shape[1:]), 0.5)  # noise has no true label: any one but the goal will do
rule = {"target": goal, "confidence": 0.9999, "eight_bit": True}
plain, tempered = (
    sparring.attack(net, grey, (goal + 1) % 10, Fooling(steps=500, loss=loss), sparring.Unbounded(), **rule)
    for loss in ("quadratic", "tempered")
)
for name, outcome in (("as it stands", plain), ("tempered", tempered)):
    print(f"{name}: {outcome.found.sum()} of 10 goals, in {outcome.backward[outcome.found].max()} steps at most")

captions = said(tempered.label, tempered.confidence, digits=2)
pictures.tiles(tempered.best, captions, "Noise, and what the network reads in it", pictures.ORANGE, columns=10)
assert tempered.found[2], "the 2 must be there"

# %% [markdown]
# ## A "2" to you, an "8" to the network
#
# Now give the descent a picture to stay near. The first term makes the network say the goal, the second keeps the
# image close to the picture:
#
# $$ C = \tfrac12 \, \lVert y_{goal} - y(x) \rVert^2 + \lambda \, \lVert x - x_{target} \rVert^2 $$
#
# The less $\lambda$, the more the first term counts. Each of these descends for 500 steps from noise; nothing stops
# it early.

# %%
twos = test.select((test.y == 2) & (net(test.x).argmax(1) == 2))
two, two_y, eight = twos.x[:1], twos.y[:1], torch.tensor([8])
rule = {"target": eight, "confidence": 0.9999, "eight_bit": True}

weights = (0.5, 0.05, 0.005, 0.0005)
classic = [
    sparring.attack(net, two, two_y, Fooling(500, lam, step_size=0.03), sparring.Unbounded(), **rule)
    for lam in weights
]

# %% [markdown]
# Look at the confidence below: with $\lambda$ = 0.5 the descent comes to rest long before 99.99 %. That is not bad
# luck. The surer the network is, with $p = y(x)_{goal}$ near 1, the flatter the first term gets (its slope shrinks
# like $(1 - p)^2$), while the pull of the second stays. They balance at some $p < 1$.
#
# So do not *weigh* certainty against nearness: *demand* it, and of all images that meet the demand take the
# nearest:
#
# $$ \min_x \; \lVert x - x_{target} \rVert_2 \quad \text{such that} \quad y(x)_8 \ge 0.9999 $$
#
# DDN (Rony et al. 2019, arXiv:1811.09600) solves this: it walks along the gradient on a sphere around the picture
# that shrinks while the demand is met and grows while it is not. Here it climbs the log-odds $\log \frac{p}{1-p}$,
# which do not flatten.

# %%
demanded = sparring.attack(net, two, two_y, DDN(steps=500, loss="log_odds"), sparring.Unbounded(), **rule)
outcomes = [*classic, demanded]
names = [*(f"λ = {lam:g}" for lam in weights), "≥ 99.99 %"]

best = torch.cat([two, *(outcome.best for outcome in outcomes)])
captions = [f"original\n2: {share(outcomes[0].clean_confidence[0].item(), 2)}\n"]
for name, outcome in zip(names, outcomes, strict=True):
    label, sure = outcome.label[0], outcome.confidence[0].item()
    captions.append(f"{name}\n{label}: {share(sure, 2)}\nL2 {outcome.distance[0]:.2f}")
pictures.strips(
    Strip("image", best, captions),
    Strip("change\n× 2", 2 * (best - two), signed=True),
)
assert demanded.found.all()
assert demanded.confidence.min() >= 0.9999

# %% [markdown]
# ## One "2", ten readings
#
# Nothing is special about the 8. The same 2, taken to every other digit, all at 99.99 % or more:

# %%
goals = torch.tensor([label for label in range(10) if label != 2])
copies, labels = two.expand(9, -1, -1, -1), two_y.expand(9)
attack, anywhere = DDN(steps=500, loss="log_odds"), sparring.Unbounded()
stored = sparring.attack(net, copies, labels, attack, anywhere, target=goals, confidence=0.9999, eight_bit=True)
order = torch.cat([two, stored.best])
sure = torch.cat([stored.clean_confidence[:1], stored.confidence])
captions = said(torch.cat([two_y, stored.label]), sure, digits=2)
pictures.tiles(order, captions, "A 2 to a person. First as it is, then as the network reads it", columns=10)

# %% [markdown]
# ## What a file keeps
#
# An attack computes in floats; a picture file has 256 levels of grey. Rounding is a change too, and an image that
# sits on the edge of 99.99 % may fall off it. `eight_bit=True` rounds every image before the network sees it, so
# that what is found is what is stored.

# %%
floats = sparring.attack(net, copies, labels, attack, anywhere, target=goals, confidence=0.9999)


def still_there(images: torch.Tensor) -> int:
    """How many of the images reach their goal with 99.99 % after they were stored as bytes and read again."""
    bytes_ = (images * 255).round().to(torch.uint8)
    sure = net(bytes_.float() / 255).double().softmax(1).gather(1, goals[:, None])
    return int((sure >= 0.9999).sum())


print(f"found in floats: {floats.found.sum()} of 9, after a file {still_there(floats.best)}")
print(f"found in 8 bits: {stored.found.sum()} of 9, after a file {still_there(stored.best)}")
assert still_there(stored.best) == stored.found.sum()

# %% [markdown]
# Chapter 3 makes the attacks stronger, less visible and cheaper.
