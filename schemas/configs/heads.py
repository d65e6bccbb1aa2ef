"""The settings under `heads` of `wmtp train`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from weighted_mtp.schemas.configs.common import Config, Positive


class DirectDecodingConfig(Config):
    """Direct multi-token decoding (DMTD): groups of layers, and tokens per cycle."""

    cycle: Annotated[int, Field(gt=0, le=256)] = Field(
        1,
        description="tokens predicted per pass of all layers, up to 4 in the paper; 1 for an ordinary model",
    )
    encoding_layers: Annotated[int, Field(ge=0)] = Field(
        0, description="number of first layers; decoding layers always read their output; 0 for the embeddings"
    )
    decoding_layers: Annotated[int, Field(ge=0)] = Field(
        0, description="number of last layers, which run alone except at the start of a cycle; 8 of 36 in the paper"
    )

    @model_validator(mode="after")
    def _check_cycle(self) -> "DirectDecodingConfig":
        if self.cycle > 1 and not self.decoding_layers:
            raise ValueError("--heads.dmtd.cycle needs --heads.dmtd.decoding_layers above 0")
        if self.cycle == 1 and (self.encoding_layers or self.decoding_layers):
            raise ValueError("--heads.dmtd.encoding_layers and decoding_layers need --heads.dmtd.cycle above 1")
        return self


class HeadsConfig(Config):
    """The offsets to predict, and the heads that predict them."""

    kind: Literal["parallel", "sequential"] = Field(
        "parallel", description="all heads read the trunk, or each reads the previous one as in DeepSeek-V3"
    )
    block: Literal["residual", "decoder"] = Field(
        "residual", description="a parallel head is x + SiLU(W x), or one decoder layer as in the MTP paper"
    )
    offsets: tuple[Positive, ...] = Field(
        (1, 2, 3, 4),
        max_length=256,
        description="distances of the predicted tokens; starts with 1, may have gaps, such as [1,3,5,7]",
    )
    coefficients: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="loss coefficient of each offset; default 1; sequential heads share 0.3"
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the steps over which all coefficients but the first rise from 0"
    )
    top_coefficient: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="loss coefficient of token order prediction (TOP); 1 in the paper; 0 disables it",
    )
    top_window: Positive | None = Field(
        None, description="number of next tokens to order; default is the rest of the document"
    )

    dmtd: DirectDecodingConfig = Field(DirectDecodingConfig(), description="direct multi-token decoding")

    @model_validator(mode="after")
    def _check_offsets(self) -> "HeadsConfig":
        if not self.offsets or self.offsets[0] != 1 or list(self.offsets) != sorted(set(self.offsets)):
            raise ValueError("--heads.offsets must start with 1 and increase, for example [1,2,3,4]")
        if self.coefficients is not None and len(self.coefficients) != len(self.offsets):
            raise ValueError(f"--heads.coefficients needs {len(self.offsets)} entries, one for each offset")
        if self.kind == "sequential" and self.block != "residual":
            raise ValueError("--heads.block is for --heads.kind parallel; sequential heads are decoder layers")
        if self.coefficients is not None and not any(self.coefficients):
            raise ValueError("--heads.coefficients must not all be 0, or there is nothing to learn")
        if self.dmtd.cycle > 1 and len(self.offsets) > 1:
            raise ValueError("--heads.dmtd.cycle needs --heads.offsets [1]: layers predict later tokens, not heads")
        if self.top_window is not None and not self.top_coefficient:
            raise ValueError("--heads.top_window needs --heads.top_coefficient above 0")
        return self

    @property
    def loss_coefficients(self) -> tuple[float, ...]:
        """One coefficient per offset, then the one of token order prediction if enabled.

        The default is 1, and lambda / D with lambda 0.3 for D sequential heads (arXiv 2412.19437).
        """
        extra = len(self.offsets) - 1
        default = 0.3 / extra if self.kind == "sequential" and extra else 1.0
        per_offset = self.coefficients or (1.0,) + (default,) * extra
        return per_offset + (self.top_coefficient,) * self.predicts_order

    @property
    def predicts_order(self) -> bool:
        """Whether token order prediction is enabled."""
        return self.top_coefficient > 0

    @property
    def predictions(self) -> tuple[str, ...]:
        """Names of the predictions with separate losses.

        The offsets, `top` for token order prediction, and with DMTD the phases of offset 1.
        """
        phases = range(self.dmtd.cycle) if self.dmtd.cycle > 1 else ()
        return (
            *map(str, self.offsets),
            *("top",) * self.predicts_order,
            *(f"phase_{phase}" for phase in phases),
        )
