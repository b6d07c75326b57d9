"""The steps of Algorithm 1 written with Hugging Face's transformers: what bench.py compares with.

Their models, their losses and torch's AdamW, as people run the method today: every position is
predicted, texts are padded to the longest of their batch, and the teacher runs in every step.
transformers is an optional install.

Letters: B batch, K positions, D width, C classes, N examples, S side.
"""
import contextlib
import types
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import mae
import mlm
from support import settings
from support.fetch import BadInput
from support.images import MEAN, STD

Batch = dict[str, Tensor]  # x and, by stage, mask, corrupted or labels


def installed() -> types.ModuleType:
    """transformers, without its progress bars; `BadInput` where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise BadInput("--peer compares with transformers, which is not installed: pip install "
                       "transformers, or leave out --peer") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def save(config: mae.Config | mlm.Config, folder: Path, seed: int) -> None:
    """Write random weights of our configuration's sizes, which both sides then read."""
    hub = installed()
    torch.manual_seed(seed)
    if isinstance(config, mae.Config):
        kind, name, fields = hub.ViTMAEConfig, "ViTMAEForPreTraining", mae._HUB_FIELDS
        more = {"norm_pix_loss": True}
    else:
        kind, name, fields = hub.RobertaConfig, "RobertaForMaskedLM", mlm.HUB_FIELDS
        more = {"type_vocab_size": 1}
    sizes = {theirs: getattr(config, ours) for ours, theirs in fields.items()}
    sizes = kind(**sizes, **more, attention_probs_dropout_prob=config.dropout)
    getattr(hub, name)(sizes).save_pretrained(folder)


class Peer:
    """One stage's model, teacher and optimiser; `best`: their fastest public setting.

    That is sdpa attention and fused AdamW, on a GPU also bf16 autocast and torch.compile; without
    it the models run eager and in float32, as the authors have it.
    """

    def __init__(self, stage: str, weights: tuple[Path, Path], text: bool, classes: int,
                 config: settings.Config, where: torch.device, best: bool) -> None:
        hub, self.text = installed(), text
        given = {"attn_implementation": "sdpa" if best else "eager"}
        lr, decay, self.clip = config.lr, config.weight_decay, config.clip
        kind = hub.RobertaForMaskedLM if text else hub.ViTMAEForPreTraining
        if stage in ("fine-tuning", "evaluation"):
            kind = hub.RobertaForSequenceClassification if text else hub.ViTForImageClassification
            given |= {"num_labels": classes, "hidden_dropout_prob": config.dropout}
            lr, decay = config.finetune_lr, config.finetune_weight_decay
            self.clip = config.finetune_clip
        self.model = kind.from_pretrained(weights[0], **given).to(where).train()
        self.teacher = None
        if stage == "self-distillation":
            self.teacher = kind.from_pretrained(weights[1], **given).to(where).eval()
            self.teacher.requires_grad_(False)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=decay,
                                           fused=best)
        fast = best and where.type == "cuda"
        self.precision = (torch.autocast("cuda", torch.bfloat16) if fast
                          else contextlib.nullcontext())
        compiled = torch.compile if fast else lambda function: function
        self.run, self.score = compiled(self.loss), compiled(self.scores)

    def known(self, x: Tensor) -> dict[str, Tensor]:
        """What their models want to be told of padding."""
        return {"attention_mask": x != self.model.config.pad_token_id} if self.text else {}

    def hidden(self, model: nn.Module, x: Tensor) -> Tensor:
        """Hidden states [B, 1+K, D] or [B, K, D] of unmasked input, zero at padding."""
        if self.text:
            states = model.roberta(x, **self.known(x)).last_hidden_state  # [B, K, D]
            return states * self.known(x)["attention_mask"][..., None]  # [B, K, D]
        sizes = model.vit.embeddings.config
        ratio, sizes.mask_ratio = sizes.mask_ratio, 0.0
        order = torch.arange((x.shape[2] // sizes.patch_size) ** 2, device=x.device).float()  # [K]
        states = model.vit(x, noise=order.expand(len(x), -1)).last_hidden_state
        sizes.mask_ratio = ratio
        return states  # [B, 1+K, D]

    def take_head(self, head: dict[str, Tensor]) -> None:
        """Our classification head, under their names."""
        names = {name.replace("linear.", "out_proj." if self.text else ""): tensor
                 for name, tensor in head.items()}
        self.model.classifier.load_state_dict(names)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch; what the lowest noise keeps is what our fixed mask keeps."""
        x = batch["x"]
        if "labels" in batch:
            return self.model(x, labels=batch["labels"], **self.known(x)).loss
        if self.text:
            labels = x.masked_fill(~batch["mask"], -100)  # [B, K]
            loss = self.model(batch["corrupted"], labels=labels, **self.known(x)).loss
            loss = loss.nan_to_num()  # nothing masked: 0 for us, 0 / 0 for them
        else:
            loss = self.model(x, noise=batch["mask"].float()).loss
        if self.teacher is None:
            return loss
        with torch.no_grad():
            target = self.hidden(self.teacher, x)
        apart = self.hidden(self.model, x).float() - target.float()  # [B, 1+K, D]
        return loss + apart.square().sum((1, 2)).mean()

    def scores(self, batch: Batch) -> Tensor:
        """Class scores [B, C]."""
        return self.model(batch["x"], **self.known(batch["x"])).logits

    def step(self, batch: Batch) -> None:
        """One step of training."""
        with self.precision:
            loss = self.run(batch)
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """Class scores float32 [N, C] on the CPU."""
        self.model.eval()
        with self.precision:
            return torch.cat([self.score(batch).float().cpu() for batch in batches])


class Pictures(torch.utils.data.Dataset):
    """Picture files as transformers' image processor delivers them, float32 [3, S, S]."""

    def __init__(self, files: list[Path], side: int) -> None:
        self.files = files
        self.processor = installed().ViTImageProcessor(
            size={"height": side, "width": side}, image_mean=MEAN, image_std=STD, resample=2)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as opened:
            picture = opened.convert("RGB")
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]


def loader(files: list[Path], side: int, batch_size: int, workers: int) -> Iterable[Tensor]:
    """Batches [B, 3, S, S] as a torch DataLoader delivers them."""
    return torch.utils.data.DataLoader(Pictures(files, side), batch_size, num_workers=workers)
