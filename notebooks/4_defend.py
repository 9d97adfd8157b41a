# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 4. Analyse defenses
#
# **What you will see.** Four networks that read digits: one undefended, one that rounds its input, one trained
# against the one-step attack, one trained against a strong attack. Judged by FGSM, three of them look robust.
# Judged by every attack we have, next to nothing is left of one of the three, and of another less than it seemed.
# You will see how to tell: curves over $\varepsilon$, an audit with a verdict for every image, the warnings of a
# gradient that is hidden, and an attacker who knows the defense.

# %%
import sparring  # before torch: see docs/decisions/003

# isort: split
from functools import partial

import pictures
from IPython.display import display
from pictures import share
from torch import Tensor, nn

from sparring.attacks.fgsm import FGSM
from sparring.attacks.pgd import PGD
from sparring.data import available
from sparring.defenses.madry import Madry

data = sparring.load("mnist" if available("mnist") else "digits")
eps = 0.3 if data.name == "mnist" else 0.2  # what the defenses are trained against
steps = 500 if data.name == "mnist" else 400
rows = data.test.take(150)

# %% [markdown]
# ## Train on the worst case
#
# Adversarial training (Madry et al. 2018, arXiv:1706.06083, equation 2.1) asks for weights whose loss is small
# where an attacker has made it as large as he can:
#
# $$ \min_\theta \sum_{(x, y)} \; \max_{\lVert \delta \rVert_\infty \le \varepsilon} L(f_\theta(x + \delta), y) $$
#
# The inner maximum is approximated by an attack on every batch. How good that attack is makes all the difference.
# One step of FGSM is cheap, but the network may learn to fool *that step* instead of becoming robust, by bending
# its loss so that the gradient at the image points nowhere useful (Tramèr et al. 2018, arXiv:1705.07204). Seven
# steps of PGD cost a few times as much, and leave it less room to hide.

# %%
game = sparring.Linf(eps)
plain = sparring.train("conv", data, steps=steps)
one_step = sparring.train("conv", data, steps=steps, defense=Madry(FGSM(), game))
madry = sparring.train("conv", data, steps=steps, defense=Madry(PGD(steps=7), game))

# %% [markdown]
# ## Or put something in front
#
# Reducing the depth of grey, here to nine levels, was proposed as a defense: small changes are rounded away (Xu,
# Evans, Qi 2018, arXiv:1704.01155). Rounding is flat almost everywhere, so its gradient is zero, and every attack
# that follows gradients stands still.


# %%
class Rounded(nn.Module):
    """A net that rounds every pixel to one of `levels` + 1 values before it looks."""

    def __init__(self, net: nn.Module, levels: int = 8) -> None:
        super().__init__()
        self.net, self.levels = net, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * self.levels).round() / self.levels)


nets = {
    "undefended": plain.net,
    "rounded input": Rounded(plain.net).eval(),
    "trained on FGSM": one_step.net,
    "trained on PGD-7": madry.net,
}

# %% [markdown]
# ## Accuracy under attack
#
# The dashed line is what a hasty author would print: accuracy against one step of FGSM. The full line is the
# accuracy that is left when **several** attacks have tried, an image counting as lost if any of them succeeds: 50
# steps of APGD (Croce and Hein 2020, arXiv:2003.01690), with each of two losses, and Square (Andriushchenko et al.
# 2020, arXiv:1912.00049), which asks for scores only, so that no gradient can mislead it.

# %%
GRID = [round(eps * k / 3, 3) for k in range(1, 5)]
WEAK, STRONG = ["fgsm"], ["apgd:steps=30", "apgd:steps=30,loss=dlr", "square:steps=150"]


def curve(net: nn.Module, attacks: list[str]) -> list[float]:
    """Accuracy on the rows at eps 0 and at each of the grid; what falls at one eps has fallen at every larger one."""
    standing = rows.select(net(rows.x).argmax(1) == rows.y)
    accuracy = [len(standing) / len(rows)]
    for radius in GRID:
        for attack in attacks:
            if len(standing):
                found = sparring.attack(
                    net, standing.x, standing.y, attack, sparring.Linf(radius), sample=standing.ids
                )
                standing = standing.select(~found.found)
        accuracy.append(len(standing) / len(rows))
    return accuracy


weak = {name: curve(net, WEAK) for name, net in nets.items()}
strong = {name: curve(net, STRONG) for name, net in nets.items()}

# %%
for axes, name in zip(pictures.charts(4, share_y=True), nets, strict=True):
    places = [0.0, *GRID]
    axes.fill_between(places, strong[name], weak[name], color=pictures.ORANGE, alpha=0.15, linewidth=0)
    axes.plot(places, weak[name], color=pictures.ORANGE, linestyle="--", marker="s", label="FGSM alone")
    axes.plot(places, strong[name], color=pictures.BLUE, marker="o", label="all attacks")
    axes.axvline(eps, color=pictures.GREY, linewidth=1, linestyle=":")
    axes.set(title=name, xlabel="eps", ylim=(-0.03, 1.03))
    pictures.percent(axes)
    if name == "undefended":
        axes.set_ylabel(f"accuracy on {len(rows)} test images")
        axes.figure.legend(loc="outside lower center", ncols=2)
pictures.plt.show()

# %% [markdown]
# The shaded part is the illusion. The dotted line marks the $\varepsilon$ that the defenses were trained against.

# %%
at = 1 + GRID.index(eps)
for name in nets:
    print(f"{name:>17}: clean {share(strong[name][0])}, FGSM {share(weak[name][at])}, all {share(strong[name][at])}")
assert strong["trained on PGD-7"][at] > max(strong[name][at] for name in nets if name != "trained on PGD-7")
assert weak["rounded input"][at] - strong["rounded input"][at] > 0.5, "most of its robustness was none"

# %% [markdown]
# ## An audit
#
# `sparring.audit` gives every image a verdict: *misclassified* when left alone; *broken*, with the adversarial
# image as evidence; *certified*, where a proof was found; else *undecided*. An undecided image has held so far,
# which is not a proof. So robust accuracy is an interval: at least what is certified, at most what is not broken.
#
# An audit also looks for signs that its figures deceive (Athalye, Carlini, Wagner 2018, arXiv:1802.00420; Carlini
# et al. 2019, arXiv:1902.06705): gradients that are zero, a search without gradients that beats one with them, an
# attack that fails even where it may change everything.

# %%
audits = {name: sparring.audit(net, data, game, limit=len(rows), profile="quick") for name, net in nets.items()}
display(audits["trained on PGD-7"])

# %%
COLOURS = {
    "certified": pictures.GREEN,
    "undecided": pictures.SKY,
    "broken": pictures.ORANGE,
    "misclassified": pictures.GREY,
}
(axes,) = pictures.charts(height=2.6)
left = dict.fromkeys(audits, 0.0)
for verdict, colour in COLOURS.items():
    shares = {name: audit.counts[verdict] / len(rows) for name, audit in audits.items()}
    if any(shares.values()):
        axes.barh(
            list(shares), list(shares.values()), left=list(left.values()), color=colour, label=verdict, height=0.6
        )
    left = {name: left[name] + part for name, part in shares.items()}
for place, audit in enumerate(audits.values()):
    low, high = audit.robust_accuracy
    axes.text(1.015, place, f"robust: {share(low)} to {share(high, up=True)}", va="center")
axes.invert_yaxis()
axes.grid(False, axis="y")
axes.set(title=f"Verdicts on {len(rows)} test images, {game.describe()}", xlim=(0, 1))
axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
pictures.percent(axes, "x")
pictures.plt.show()

# %% [markdown]
# ## What holds, and what only hides
#
# The warnings name the defense that hides its gradient. The net trained on FGSM fools one step only: the attacks of
# the audit take several, so that its figure is low, and sound.

# %%
for name, audit in audits.items():
    print(f"{name}: warnings {len(audit.warnings)}")
    for warning in audit.warnings:
        print(f"    {warning}")
assert any(warning.startswith("zero_gradient") for warning in audits["rounded input"].warnings)

# %% [markdown]
# A defense must hold against an attacker who knows it. He knows that rounding changes a pixel by no more than half
# a level, and pretends on the way back that it changes nothing: forwards the net rounds, backwards the gradient
# passes straight through. That is *backward pass differentiable approximation* (Athalye et al. 2018, section 4.1);
# it takes one line.


# %%
class StraightThrough(Rounded):
    """The same answers as `Rounded`, with the gradient of a net that does not round."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x * self.levels).round() / self.levels
        return self.net(x + (rounded - x).detach())


known = StraightThrough(plain.net).eval()
blind = sparring.attack(nets["rounded input"], rows.x, rows.y, "pgd:steps=40", game)
aware = sparring.attack(known, rows.x, rows.y, "pgd:steps=40", game)
answers = nets["rounded input"](aware.best).argmax(1)  # the defense itself has the last word
left_over = (answers == rows.y).double().mean().item()
print(f"PGD that follows the gradient of rounding: {share(blind.robust_accuracy)} held")
print(f"PGD that knows what rounding does:         {share(left_over)} held")
assert left_over < 0.1 < blind.robust_accuracy

# %% [markdown]
# ## The price
#
# Robustness is not free: it costs time, and accuracy on clean images. Longer training makes the second cost
# smaller; on some data no training can have both (Tsipras et al. 2019, arXiv:1805.12152).

# %%
trained = {"undefended": plain, "trained on FGSM": one_step, "trained on PGD-7": madry}
right, middle, left = pictures.charts(3, height=2.4, share_y=True)
colours = [pictures.GREY, pictures.ORANGE, pictures.BLUE]
clean = [checkpoint.card["accuracy"] for checkpoint in trained.values()]
robust = [audits[name].robust_accuracy[1] for name in trained]
cost = [checkpoint.card["seconds"] / plain.card["seconds"] for checkpoint in trained.values()]
for axes, title, values, form in (
    (right, "Clean accuracy", clean, share),
    (middle, f"Robust at eps {eps}, at most", robust, partial(share, up=True)),
    (left, "Training time, plain = 1", cost, "{:.1f}".format),
):
    axes.barh(list(trained), values, color=colours, height=0.6)
    for place, value in enumerate(values):
        axes.text(value, place, f" {form(value)}", va="center")
    axes.set(title=title, xlim=(0, 1.35 * max(values)), xticks=[])
    axes.grid(False)
right.invert_yaxis()
pictures.plt.show()

# %% [markdown]
# **What to remember.** Say the threat model. Attack with more than one step, more than one loss, and once without
# gradients. Give the attacker your defense. Report the clean accuracy next to the robust one, and an interval where
# you have no proof. The networks here are small and trained for minutes at most; longer training does better.
