"""
Train a GPT for the arena's fixed wall-clock budget and have it scored. The only file an experiment edits.

    uv run train.py                                 one CUDA GPU: bfloat16, compiled
    AUTORESEARCH_ARENA=demo uv run train.py         any CPU: float32, a small model

One file, top to bottom: constants, model, optimizers, training. prepare.py owns the data, the clock and the score.
"""

import gc
import os
from collections import deque

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")    # read by torch when it is imported

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import ARENA, TrainLoader, finish

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    from torch.nn.attention.varlen import varlen_attn  # seconds to import, and of no use to a CPU


def pick(*by_card):
    """One value for each class of machine: CPU, then GPUs up to 8, 12, 24, 48 and 80 GB or more."""
    if DEVICE == "cpu":
        return by_card[0]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return by_card[1 + sum(memory > limit for limit in (9, 13, 25, 49))]


# -----------------------------------------------------------------------------
# Constants, to be edited in place. The last numbers, for 80 GB, are upstream's published shape and rates.
# [a, b] is the range that the offline agent searches.

#                    CPU    8 GB   12 GB  24 GB  48 GB  80 GB
DEPTH         = pick(2,     4,     6,     8,     8,     8)       # [1, 16] layers
HEADS         = pick(2,     2,     3,     4,     4,     4)       # [1, 16] attention heads in a layer
HEAD_DIM      = pick(48,    128,   128,   128,   128,   128)     # width of a head; the model's is HEADS * HEAD_DIM
BATCH         = pick(2**12, 2**15, 2**16, 2**17, 2**18, 2**19)   # [2**10, 2**20] tokens in an optimizer step
MICRO_BATCH   = pick(2**12, 2**13, 2**14, 2**15, 2**16, 2**17)   # tokens in a forward pass, bounded by memory
WINDOWS       = "SSSL"      # one letter a layer, repeated: L sees the whole row, S a part of it; the last layer is L
SHORT_WINDOW  = 0.5         # [0.05, 1.0] reach of an S layer, as a share of the row
MLP_RATIO     = 4           # [1, 8] hidden width of the MLP over the model's width
ROPE_BASE     = 10000.0     # [1000.0, 1000000.0] base of the rotary wavelengths
SOFTCAP       = 15.0        # [5.0, 50.0] logits are squeezed into plus or minus this
VALUE_GATE    = 32          # channels of the residual stream that gate the value embeddings

EMBEDDING_LR  = 0.6         # [0.05, 3.0] AdamW, token and value embeddings, at width 768
HEAD_LR       = 0.004       # [0.0005, 0.05] AdamW, output head, at width 768
SCALAR_LR     = 0.5         # [0.02, 2.0] AdamW, residual scalars; those of the residual stream itself take 1% of it
ADAM_BETA1    = 0.8         # [0.5, 0.95] first moment of AdamW
ADAM_BETA2    = 0.95        # [0.8, 0.999] second moment of AdamW
MATRIX_LR     = 0.04        # [0.005, 0.2] Muon, every matrix inside a layer
MOMENTUM      = 0.95        # [0.8, 0.99] Muon, after its warm-up
MOMENTUM_STEPS = 300        # [10, 1000] steps over which the momentum rises from 0.85
WEIGHT_DECAY  = 0.2         # [0.0, 1.0] Muon, fades to 0 with the budget
WARMDOWN      = 0.5         # [0.05, 1.0] share of the budget over which the rates fall
FINAL_LR      = 0.0         # [0.0, 0.3] where they end, as a share of the start

WIDTH = HEADS * HEAD_DIM
T, V = ARENA.sequence_len, ARENA.vocab_size

# -----------------------------------------------------------------------------
# Model


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotary(head_dim):
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), each (T, 1, head_dim / 2)."""
    wavelengths = ROPE_BASE ** (torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    angles = torch.arange(T, device=DEVICE)[:, None] / wavelengths
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def document_mask(x, window):
    """Bool (B, 1, T, T), on a CPU: a query sees no later key, none beyond the window, none of another document."""
    document = (x == ARENA.bos).cumsum(1)
    back = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
    return ((back >= 0) & (back <= window) & (document[:, :, None] == document[:, None, :]))[:, None]


def document_offsets(x):
    """Starts of the documents in the flattened batch, int32 (B * slots + 1,): a fixed length, as compiling needs.

    A slot that a row does not need is empty and lies at the row's end; where a row has more documents than slots,
    the last slot holds the rest.
    """
    slots = max(T // 32, 1)
    rows = torch.arange(len(x), device=x.device)[:, None]
    document = (x == ARENA.bos).cumsum(1)
    slot = (document - document[:, :1]).clamp(max=slots - 1) + rows * slots
    offsets = ((rows + 1) * T).expand(-1, slots).flatten()
    offsets = offsets.scatter_reduce(0, slot.flatten(), torch.arange(x.numel(), device=x.device), "amin")
    return F.pad(offsets, (0, 1), value=x.numel()).int()


class Attention(nn.Module):
    def __init__(self, window, has_value_embedding):
        super().__init__()
        self.window = window
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(VALUE_GATE, HEADS, bias=False) if has_value_embedding else None

    def forward(self, x, value_embedding, rope, documents):
        B = len(x)
        q, k, v = (f(x).view(B, T, HEADS, HEAD_DIM) for f in (self.query, self.key, self.value))
        if self.gate is not None:   # value residual (arXiv 2410.17897), from an embedding and gated for each head
            gate = 2 * torch.sigmoid(self.gate(x[..., :VALUE_GATE]))
            v = v + gate[..., None] * value_embedding.view(B, T, HEADS, HEAD_DIM)
        q, k = norm(rotate(q, *rope)), norm(rotate(k, *rope))
        if DEVICE == "cuda":
            q, k, v = (t.flatten(0, 1).bfloat16() for t in (q, k, v))
            y = varlen_attn(q, k, v, documents, documents, T, T, window_size=(self.window, 0))
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=documents[self.window]).transpose(1, 2)
        return self.out(y.reshape(B, T, WIDTH))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, MLP_RATIO * WIDTH, bias=False)
        self.down = nn.Linear(MLP_RATIO * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        letters = (WINDOWS * DEPTH)[: DEPTH - 1] + "L"
        # not -1 for L: a window as long as the row is the same, and keeps every layer on one attention kernel
        self.windows = [T if letter == "L" else max(int(T * SHORT_WINDOW), 1) for letter in letters]
        valued = range((DEPTH - 1) % 2, DEPTH, 2)       # layers with a value embedding: every second, and the last
        self.embed = nn.Embedding(V, WIDTH)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(V, WIDTH) for i in valued})
        self.attentions = nn.ModuleList(Attention(self.windows[i], i in valued) for i in range(DEPTH))
        self.mlps = nn.ModuleList(MLP() for _ in range(DEPTH))
        self.residual = nn.Parameter(torch.empty(DEPTH))    # weight of the stream at each layer
        self.skip = nn.Parameter(torch.empty(DEPTH))        # weight of the token embedding at each layer
        self.head = nn.Linear(WIDTH, V, bias=False)
        self.register_buffer("cos", rotary(HEAD_DIM)[0], persistent=False)
        self.register_buffer("sin", rotary(HEAD_DIM)[1], persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Unit embeddings, uniform matrices of standard deviation 1 / sqrt(width), silent output projections."""
        bound = (3 / WIDTH) ** 0.5
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.head.weight, std=0.001)
        nn.init.ones_(self.residual)
        nn.init.constant_(self.skip, 0.1)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            for linear in (attention.query, attention.key, attention.value, mlp.up):
                nn.init.uniform_(linear.weight, -bound, bound)
            for linear in (attention.out, mlp.down, attention.gate):
                if linear is not None:
                    nn.init.zeros_(linear.weight)

    def forward(self, x, y=None):
        """Logits (B, T, V) of tokens x (B, T); with targets y, their mean loss."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            if DEVICE == "cuda":
                documents = document_offsets(x)
            else:
                documents = {window: document_mask(x, window) for window in set(self.windows)}
            h = start = norm(self.embed(x)).to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
            for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
                h = self.residual[i] * h + self.skip[i] * start
                values = self.value_embeds[str(i)](x) if str(i) in self.value_embeds else None
                h = h + attention(norm(h), values, (self.cos, self.sin), documents)
                h = h + mlp(norm(h))
            logits = SOFTCAP * torch.tanh(self.head(norm(h)).float() / SOFTCAP)
        return logits if y is None else F.cross_entropy(logits.view(-1, V), y.view(-1))


def flops_per_token(model):
    """Forward and backward: 6 for each weight of a matrix product, 12 for each key a query sees in each channel."""
    tables = model.embed.weight.numel() + sum(t.weight.numel() for t in model.value_embeds.values())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - tables
    # a causal query at position t sees min(t, window) keys; the mean over the row
    keys = sum(w - w * w / (2 * T) for w in model.windows)
    return 6 * matrices + 12 * WIDTH * keys


# -----------------------------------------------------------------------------
# Optimizers: Muon for the matrices inside the layers, AdamW for everything else

# Polar Express (arXiv 2505.16932): five odd polynomials that together send every singular value close to 1
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices):
    """Nearest semi-orthogonal matrices to a stack (N, rows, columns)."""
    x = matrices.bfloat16() if DEVICE == "cuda" else matrices
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_update(weights, grads, momenta, lr, momentum, decay):
    """Step a stack (N, rows, columns) in place. The scalars are 0-D tensors, so that one compiled graph serves all."""
    momenta.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momenta, momentum)).to(weights.dtype)
    lr = lr * max(1.0, weights.size(1) / weights.size(2)) ** 0.5
    cautious = (update * weights) > 0       # decay only where the step shrinks the weight too (arXiv 2510.12402)
    weights.sub_(lr * (update + decay * weights * cautious))


def adamw_update(weight, grad, mean, square, lr, step):
    """Step one tensor in place (arXiv 1711.05101, without decay)."""
    mean.lerp_(grad, 1 - ADAM_BETA1)
    square.lerp_(grad.square(), 1 - ADAM_BETA2)
    spread = (square / (1 - ADAM_BETA2**step)).sqrt()
    weight.sub_(lr * mean / (1 - ADAM_BETA1**step) / (spread + 1e-10))


class Muon:
    """Momentum, orthogonalized (Keller Jordan, Muon): matrices of one shape, stepped as one stack."""

    def __init__(self, matrices, lr):
        self.matrices, self.lr, self.start_lr = matrices, lr, lr
        self.momentum, self.decay = MOMENTUM, WEIGHT_DECAY
        self.momenta = torch.zeros((len(matrices), *matrices[0].shape), device=DEVICE)

    @torch.no_grad()
    def step(self):
        weights, grads = torch.stack(self.matrices), torch.stack([p.grad for p in self.matrices])
        scalars = (torch.tensor(scalar) for scalar in (self.lr, self.momentum, self.decay))
        compiled(muon_update)(weights, grads, self.momenta, *scalars)
        torch._foreach_copy_(self.matrices, list(weights.unbind()))


class AdamW:
    """Tensors that share a rate."""

    def __init__(self, tensors, lr):
        self.tensors, self.lr, self.start_lr, self.steps = tensors, lr, lr, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in tensors]

    @torch.no_grad()
    def step(self):
        self.steps += 1
        scalars = torch.tensor(self.lr), torch.tensor(float(self.steps))
        for p, (mean, square) in zip(self.tensors, self.moments, strict=True):
            compiled(adamw_update)(p, p.grad, mean, square, *scalars)


def make_optimizers(model):
    """One optimizer for each group of parameters that share a rate and a way to be stepped."""
    scale = (WIDTH / 768) ** -0.5       # upstream tuned its rates at width 768
    matrices = [p for module in (*model.attentions, *model.mlps) for p in module.parameters()]
    return [
        AdamW([model.embed.weight, *(table.weight for table in model.value_embeds.values())], EMBEDDING_LR * scale),
        AdamW([model.head.weight], HEAD_LR * scale),
        AdamW([model.residual], SCALAR_LR * 0.01),
        AdamW([model.skip], SCALAR_LR),
        *(Muon([p for p in matrices if p.shape == shape], MATRIX_LR) for shape in sorted({p.shape for p in matrices})),
    ]


def schedule(optimizers, step, progress):
    """Set what changes in the course of the budget."""
    falling = min(1.0, (1 - progress) / WARMDOWN)
    for optimizer in optimizers:
        optimizer.lr = optimizer.start_lr * (falling + (1 - falling) * FINAL_LR)
        if isinstance(optimizer, Muon):
            optimizer.momentum = 0.85 + (MOMENTUM - 0.85) * min(step / MOMENTUM_STEPS, 1.0)
            optimizer.decay = WEIGHT_DECAY * (1 - progress)


# -----------------------------------------------------------------------------
# Training

_compiled = {}


def compiled(function):
    """The function itself on a CPU, its compiled form on a GPU; compiled once."""
    if DEVICE == "cpu":
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]


def train_step(model, optimizers, x, y):
    """One optimizer step on x and y (rows, T), in micro-batches. Returns the mean loss, still on the device."""
    parts = list(zip(x.split(MICRO_BATCH // T), y.split(MICRO_BATCH // T), strict=True))
    total = 0.0
    for part in parts:
        loss = model(*part) / len(parts)
        loss.backward()
        total = total + loss.detach()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return total


def warm_up(model, network, rows):
    """Compile and run everything once on random tokens, then put the weights back: the clock has not started yet."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(V, (max(rows, ARENA.eval_rows), T), device=DEVICE)
    train_step(network, make_optimizers(model), tokens[:rows], tokens[:rows])
    network.eval()      # as `finish` will call it
    with torch.no_grad():
        network(tokens[: ARENA.eval_rows])
    network.train()
    model.load_state_dict(before)


def check(loss):
    """Stop at once when training has diverged: a run that is lost should not cost five minutes."""
    if not loss < 100:      # worded so that NaN fails
        raise SystemExit(f"error: the loss diverged: {loss.item()}")


def main():
    torch.manual_seed(ARENA.seed)
    torch.set_float32_matmul_precision("high")
    rows = BATCH // T
    if BATCH % T or MICRO_BATCH % T or BATCH % min(BATCH, MICRO_BATCH):
        raise SystemExit(f"error: BATCH {BATCH} must be a multiple of MICRO_BATCH {MICRO_BATCH}, and both of T {T}")
    model = GPT().to(DEVICE)
    network = compiled(model)
    warm_up(model, network, rows)
    optimizers = make_optimizers(model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{DEVICE}: {DEPTH} layers x {WIDTH}, batch {BATCH} tokens, {parameters:,} parameters", flush=True)
    gc.collect()
    gc.freeze()     # a collection in the middle of the run would stall it
    gc.disable()

    loader = TrainLoader(rows, DEVICE)
    losses = deque(maxlen=3)
    for step, (x, y) in enumerate(loader):
        schedule(optimizers, step, loader.progress)
        losses.append(train_step(network, optimizers, x, y).to("cpu", non_blocking=True))
        if step < 2:
            continue
        check(losses[0])        # has arrived: the loader lets the CPU run at most two batches ahead
        if step % 10 == 0:
            speed, loss = loader.tokens / loader.elapsed(), losses[0].item()
            print(f"step {step:5d}  {loader.progress:6.1%}  loss {loss:.4f}  {speed:,.0f} tok/s", flush=True)
    check(losses[-1])
    gc.unfreeze()
    gc.enable()
    finish(network, loader, depth=DEPTH, flops_per_token=flops_per_token(model))


if __name__ == "__main__":
    main()
