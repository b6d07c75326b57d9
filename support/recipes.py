"""Hyper-parameters (the paper's §5 and Table 9, of which few numbers are left) and names of data.

A key of DEFAULTS is (modality, recipe). "paper" has the paper's values where it gives them, else
the released code's (images) or, of texts, the learning rates of Gururangan et al.'s code and for
the rest what was chosen here; "small" is for models whose encoder has fewer than SMALL parameters.
warmup is a share of the steps, clip a gradient norm (0: none), an epoch ⌈N/B⌉ steps. What begins
with finetune_ or names a baseline is of fine-tuning, as dropout is; the rest is of pre-training.
"""
SMALL = 5_000_000
TUNED = dict(finetune_weight_decay=0.01, finetune_clip=1.0)
DEFAULTS = {
    ("image", "paper"): TUNED | dict(
        steps=20_000, batch_size=64, lr=1.5e-4, weight_decay=0.01, betas=(0.9, 0.95), warmup=0.0,
        clip=0.0, mask_prob=0.75, pretrain_dropout=0.0,
        finetune_steps=10_000, finetune_batch_size=32, finetune_lr=1e-4, finetune_warmup=0.05,
        dropout=0.1, recadam_cof=5000.0, recadam_t0=250, mars_radius=8.0, r3f_eps=1e-5),
    ("image", "small"): TUNED | dict(
        steps=400, batch_size=64, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95), warmup=0.0,
        clip=0.0, mask_prob=0.5, pretrain_dropout=0.0,
        finetune_steps=300, finetune_batch_size=32, finetune_lr=1e-3, finetune_warmup=0.05,
        dropout=0.0, mars_radius=1.0, r3f_eps=0.1),
    ("text", "paper"): TUNED | dict(
        epochs=100, batch_size=128, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), warmup=0.06,
        clip=1.0, mask_prob=0.15, pretrain_dropout=0.1,
        finetune_epochs=10, finetune_batch_size=32, finetune_lr=2e-5, finetune_warmup=0.06,
        dropout=0.1, recadam_cof=5000.0, recadam_t0=100, mars_radius=8.0, r3f_eps=1e-5),
    ("text", "small"): TUNED | dict(
        epochs=2, batch_size=32, lr=5e-4, weight_decay=0.01, betas=(0.9, 0.999), warmup=0.06,
        clip=1.0, mask_prob=0.15, pretrain_dropout=0.0,
        finetune_epochs=2, finetune_batch_size=32, finetune_lr=2e-3, finetune_warmup=0.06,
        dropout=0.0, mars_radius=1.0, r3f_eps=0.01)}
SMOKE = dict(steps=4, batch_size=8, finetune_steps=4, finetune_batch_size=8)
AS_RELEASED = dict(match="cls", masking="fixed", pixels="norm", precision="fp32")
TOYS = {"toybirds": "tiny", "pydocs": "tiny"}
HUB = {"image": "facebook/vit-mae-base", "text": "FacebookAI/roberta-base"}
TEXTS = ("chemprot", "acl_arc", "scierc", "twitter_emotion", "pydocs")
IMAGES = ("aircraft", "cub", "chest_xray", "dtd", "dogs", "flower", "cifar100", "toybirds")
