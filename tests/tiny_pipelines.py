"""Stock pipelines of diffusers with random weights, small enough to build in a test; nothing is downloaded."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch

LENGTH = 12
"""Tokens of an encoded prompt."""


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """What `build()` makes with this seed; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def clip_tokenizer() -> Any:
    """CLIP's tokenizer with letters for words."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase + string.digits + ".,!?")]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> Any:
    """T5's tokenizer with letters for words."""
    from transformers import T5Tokenizer

    letters = [("▁", -2.0), *((c, -3.0) for c in string.ascii_lowercase)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=LENGTH)


def clip(tokenizer: Any, seed: int = 0, projected: bool = False) -> Any:
    """A text encoder of width 32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_act="gelu",
        initializer_range=0.3,
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return seeded(lambda: kind(config).eval(), seed)


def t5(tokenizer: Any, width: int = 32) -> Any:
    """A T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    return seeded(lambda: T5EncoderModel(config).eval())


def vae(channels: int = 4, **config: Any) -> Any:
    """A VAE that halves each side."""
    from diffusers import AutoencoderKL

    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": channels,
        "norm_num_groups": 4,
        "sample_size": 16,
        **config,
    }
    return seeded(lambda: AutoencoderKL(**settings).eval())


def tiny_vae(channels: int = 4) -> Any:
    """A cheap decoder for the same latents."""
    from diffusers import AutoencoderTiny

    return seeded(
        lambda: AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).eval()
    )


def ddim(**config: Any) -> Any:
    """The scheduler of Stable Diffusion 1.5, as DDIM."""
    from diffusers import DDIMScheduler

    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        **config,
    }
    return DDIMScheduler(**settings)


def ddpm(**config: Any) -> Any:
    """DDPM without clipping."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(**{"clip_sample": False, **config})


def network(seed: int = 0, **config: Any) -> Any:
    """A UNet of two blocks on 4x8x8 rows, without conditioning unless `num_class_embeds` is given."""
    from diffusers import UNet2DModel

    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        **config,
    }
    return seeded(lambda: UNet2DModel(**settings).eval(), seed)


def unet(seed: int = 0, **config: Any) -> Any:
    """A text-conditional UNet of two blocks on 8x8 latents."""
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        **config,
    }
    return seeded(lambda: UNet2DConditionModel(**settings).eval(), seed)


def sd15(scheduler: Any = None) -> Any:
    """Stable Diffusion 1.5: images of 16x16."""
    from diffusers import StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scheduler: Any = None) -> Any:
    """Stable Diffusion XL: images of 16x16."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = clip_tokenizer()
    network = unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        use_linear_projection=True,
    )
    own = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer),
        text_encoder_2=clip(tokenizer, 1, True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=network,
        scheduler=scheduler or own,
        add_watermarker=False,
    )


def sd3(scheduler: Any = None) -> Any:
    """Stable Diffusion 3: images of 16x16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, other = clip_tokenizer(), t5_tokenizer()
    network = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
        ).eval()
    )
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, 0, True),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, 1, True),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(other, 64),
        tokenizer_3=other,
    )


def flux(scheduler: Any = None) -> Any:
    """FLUX.1: images of 16x16, with a shift that depends on the size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, other = clip_tokenizer(), t5_tokenizer()
    network = seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ).eval()
    )
    return FluxPipeline(
        transformer=network,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(other),
        tokenizer_2=other,
    )


def pixart(kind: str, scheduler: Any = None) -> Any:
    """PixArt-alpha or PixArt-sigma ("Alpha", "Sigma"): images of 16x16, with a variance that is learnt and not used."""
    import diffusers

    tokenizer = t5_tokenizer()
    network = seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            cross_attention_dim=32,
            caption_channels=32,
            norm_num_groups=4,
        ).eval()
    )
    return getattr(diffusers, f"PixArt{kind}Pipeline")(
        tokenizer=tokenizer, text_encoder=t5(tokenizer), vae=vae(), transformer=network, scheduler=scheduler or ddim()
    )


def sana(scheduler: Any = None) -> Any:
    """Sana: images of 32x32, a flow in the latents of a deep-compression autoencoder."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = t5_tokenizer()
    encoder = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    network = seeded(
        lambda: SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=32,
            sample_size=8,
        ).eval()
    )
    codec = seeded(
        lambda: AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock",) * 2,
            decoder_block_types=("ResBlock",) * 2,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ).eval()
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=seeded(lambda: Gemma2Model(encoder).eval()),
        vae=codec,
        transformer=network,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


PIPELINES: dict[str, Callable[..., Any]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "pixart_alpha": lambda scheduler=None: pixart("Alpha", scheduler),
    "pixart_sigma": lambda scheduler=None: pixart("Sigma", scheduler),
}
