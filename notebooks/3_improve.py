# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 3. Improve them
#
# **What you will see.** Four ways to be better than chapter 2. *Stronger*: more images fall within the same
# $\varepsilon$. *Cheaper*: the same with fewer passes through the network. *Further*: images made on one network
# fool another one, which the attacker never saw. *Less visible*: the same goal is reached, and less of the image is
# changed.

# %%
import sparring  # before torch: see docs/decisions/003

# isort: split
import pictures
import torch
from IPython.display import display
from pictures import Strip, share

from sparring.attacks.ddn import DDN
from sparring.attacks.fooling import Fooling
from sparring.data import available

data = sparring.load("mnist" if available("mnist") else "digits")
steps = 800 if data.name == "mnist" else 300
conv, dense = (sparring.train(name, data, steps=steps).net for name in ("conv", "dense"))
rows = data.test.take(200)
x, y = rows.x, rows.y

# %% [markdown]
# ## Stronger: more than one step
#
# FGSM trusts that the loss is a plane. It is not: after a short way the gradient has turned. Projected gradient
# descent (Madry et al. 2018, arXiv:1706.06083) takes many small steps of length $\alpha$ and goes back into the
# ball $B = \{x' : \lVert x' - x \rVert_\infty \le \varepsilon\}$ after each,
#
# $$ x_{k+1} = \Pi_B \left( x_k + \alpha \; \mathrm{sign}\, \nabla_x L(f(x_k), y) \right) $$
#
# Its step size is a guess. Auto-PGD (Croce and Hein 2020, arXiv:2003.01690) begins with large steps, adds momentum,
# and halves the step when the loss no longer rises.
#
# `sparring.compare` runs several attacks on the same images, seen by the same judge.

# %%
eps = 0.1
stronger = sparring.compare(conv, x, y, ["fgsm", "pgd:steps=40", "apgd:steps=100"], sparring.Linf(eps))
display(stronger)
one_step, pgd, apgd = stronger.entries
assert one_step.success < pgd.success <= apgd.success + 0.01

# %% [markdown]
# ## Cheaper: what a row costs
#
# Price an attack by its passes through the network, for that is where the time goes: a step of PGD takes one
# forwards and one backwards. An image that has fallen needs no further step. Here it leaves at once and another
# takes its seat, so that "40 steps" is a ceiling, not the price.

# %%
budgets = [1, 2, 5, 10, 20, 40]
families = {"pgd": (pictures.BLUE, "o", "-"), "apgd": (pictures.ORANGE, "s", "--")}
names = ["fgsm", *(f"{family}:steps={steps}" for family in families for steps in budgets)]
cheaper = sparring.compare(conv, x, y, names, sparring.Linf(eps))
paid = {entry.name: entry.backward / len(rows) for entry in cheaper.entries}
won = {entry.name: entry.success for entry in cheaper.entries}

left, right = pictures.charts(2)
left.plot(paid["fgsm"], won["fgsm"], color="black", marker="D", linestyle="", label="fgsm")
for family, (colour, marker, line) in families.items():
    members = [f"{family}:steps={steps}" for steps in budgets]
    passes, style = [paid[name] for name in members], {"color": colour, "marker": marker, "linestyle": line}
    left.plot(passes, [won[name] for name in members], label=family, **style)
    right.plot(budgets, passes, label=family, **style)
left.set(title=f"Images that fall, eps {eps}", xlabel="backward passes a row, on average")
pictures.percent(left)
left.legend(loc="lower right")
right.plot(budgets, budgets, color=pictures.GREY, linestyle=":", label="if nobody left early")
right.set(title="What is paid", xlabel="steps allowed", ylabel="backward passes a row")
right.legend()
pictures.plt.show()
print(f"PGD may take 40 steps, and pays for {paid['pgd:steps=40']:.1f} a row")
assert paid["pgd:steps=40"] < 40

# %% [markdown]
# ## Further: from one network to another
#
# Suppose the attacker never sees `dense`. He makes his images on `conv`, a network of his own, and hands them on.
# Many of them work: both networks learned from the same digits, and lean on the same pixels (Szegedy et al. 2014,
# arXiv:1312.6199; Papernot et al. 2016, arXiv:1605.07277).
#
# How he stops matters. An image that has only just crossed the boundary of `conv` need not cross that of `dense`.
# So he goes on until `conv` is *sure* of its mistake (`confidence=0.9999`), or to the last step.

# %%
GRID = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3]
seed = torch.Generator().manual_seed(0)
readable = dense(x).argmax(1) == y


def fooled(images: torch.Tensor) -> float:
    """The share of the digits that `dense` reads, less those that it still reads in `images`."""
    return (dense(images).argmax(1) != y)[readable].double().mean().item()


one, many, direct, sure, just, chance = ([] for _ in range(6))
for radius in GRID:
    ball, pgd = sparring.Linf(radius), "pgd:steps=40"
    one.append(sparring.attack(conv, x, y, "fgsm", ball).success_rate)
    crossed = sparring.attack(conv, x, y, pgd, ball)
    many.append(crossed.success_rate)
    just.append(fooled(crossed.best))
    sure.append(fooled(sparring.attack(conv, x, y, pgd, ball, confidence=0.9999).best))
    direct.append(fooled(sparring.attack(dense, x, y, pgd, ball).best))
    signs = torch.randint(0, 2, x.shape, generator=seed) * 2 - 1
    chance.append(fooled((x + radius * signs).clamp(0, 1)))

# %%
left, right = pictures.charts(2, height=4.2, share_y=True)
left.plot(GRID, one, color="black", marker="D", linestyle="--", label="fgsm")
left.plot(GRID, many, color=pictures.BLUE, marker="o", label="pgd, 40 steps")
left.set(title="conv, attacked directly", xlabel="eps", ylabel="images that fall")
right.plot(GRID, direct, color=pictures.BLUE, marker="o", label="attacked directly")
right.plot(GRID, sure, color=pictures.ORANGE, marker="s", linestyle="--", label="made on conv, till it is sure")
right.plot(GRID, just, color=pictures.GREEN, marker="^", linestyle="-.", label="made on conv, till it falls")
right.plot(GRID, chance, color=pictures.GREY, marker="x", linestyle=":", label="random signs")
right.set(title="dense, by pgd with 40 steps", xlabel="eps")
for axes in (left, right):
    pictures.percent(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
pictures.plt.show()

# %% [markdown]
# On the left, what more steps bring at every size. On the right, the price of not seeing the network, which shrinks
# as $\varepsilon$ grows. So secrecy is no defense; it only raises the price.

# %%
at = GRID.index(0.1)
for name, values in {"direct": direct, "sure": sure, "just": just, "random": chance}.items():
    print(f"dense at eps 0.1, {name:>6}: {share(values[at])}")
assert direct[at] > sure[at] > just[at] > chance[at]

# %% [markdown]
# ## Less visible: the nearest image
#
# Now the goal is fixed (each digit is to be read as the next one) and the length of the change is what counts, in
# $L_2$. The classic descent of chapter 2 weighs the two by $\lambda$. DDN (Rony et al. 2019, arXiv:1811.09600) goes
# straight for the boundary: while the image fools the network its radius shrinks by 5 %, else it grows by 5 %.

# %%
few = rows.take(100)
goals = (few.y + 1) % 10
classic = Fooling(steps=500, lam=0.5, step_size=0.1, loss="quadratic")
nearer = sparring.compare(conv, few.x, few.y, [classic, DDN(steps=100)], sparring.Unbounded(), target=goals)
display(nearer)

# %%
old, new = nearer.outcomes
both = old.found & new.found & ~old.clean

left, right = pictures.charts(2, height=3.6)
for outcome, name, colour, line in (
    (old, "classic, 500 steps", pictures.ORANGE, "--"),
    (new, "DDN, 100 steps", pictures.BLUE, "-"),
):
    lengths = outcome.distance[outcome.found].sort().values
    reached = torch.arange(1, len(lengths) + 1) / len(few)
    left.step(lengths, reached, where="post", color=colour, linestyle=line, label=name)
left.set(title="Goals reached within a length", xlabel="L2 length of the change", ylim=(0, 1.03))
left.legend(loc="lower right")
pictures.percent(left)
limit = 1.05 * max(old.distance[both].max().item(), new.distance[both].max().item())
right.plot([0, limit], [0, limit], color=pictures.GREY, linewidth=1, linestyle=":", label="equally near")
right.scatter(old.distance[both], new.distance[both], color=pictures.BLUE, s=16, label="an image that both turn")
right.set(title="Image by image", xlabel="classic, L2", ylabel="DDN, L2", xlim=(0, limit), ylim=(0, limit))
right.legend(loc="upper left")
pictures.plt.show()

shorter = (new.distance < old.distance)[both].double().mean().item()
print(f"goals reached: classic {old.found.sum()}, DDN {new.found.sum()} of {len(few)}")
print(f"of the {both.sum()} that both reach, DDN is nearer in {share(shorter)}")
assert new.distance[both].mean() < old.distance[both].mean()
assert new.found.sum() >= old.found.sum()

# %%
some = both.nonzero().squeeze(1)
some = some[(old.distance - new.distance)[some].argsort(descending=True)]
some = some[torch.linspace(0, len(some) - 1, 6).long()]
origin = few.x[some]


def caption(outcome: sparring.Outcome) -> list[str]:
    """The label that the net gives, and the length of the change."""
    pairs = zip(outcome.label[some].tolist(), outcome.distance[some].tolist(), strict=True)
    return [f"{label}\nL2 {length:.2f}" for label, length in pairs]


pictures.strips(
    Strip("original", origin, [str(label) for label in few.y[some].tolist()], colour=pictures.BLUE),
    Strip("classic", old.best[some], caption(old), colour=pictures.ORANGE),
    Strip("change\n× 2", 2 * (old.best[some] - origin), signed=True),
    Strip("DDN", new.best[some], caption(new), colour=pictures.ORANGE),
    Strip("change\n× 2", 2 * (new.best[some] - origin), signed=True),
)

# %% [markdown]
# From the image where the two differ most to the one where they differ least. Chapter 4 asks what can be done
# against all this.
