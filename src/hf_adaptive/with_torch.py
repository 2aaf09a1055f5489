"""What users import, as far as it needs torch and transformers; registration with the Auto classes."""

from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import is_peft_available

from .auto import AutoModelForSequenceClassificationWithExits
from .calibration import CalibrationReport, ExitCalibrator, calibrate_exits
from .deployment.onnx_export import export_onnx
from .evaluation import ExitReport, evaluate_exits
from .hub import choose_card_to_upload
from .modeling.architectures import ARCHITECTURES, Architecture, register_architecture
from .modeling.cascade import CascadeForSequenceClassification
from .modeling.cascade_configuration import CascadeConfig
from .modeling.exits import ExitsMixin
from .modeling.heads import Head
from .modeling.outputs import SequenceClassifierWithExitsOutput
from .pipeline import ExitsTextClassificationPipeline
from .probing import mean_attention, rank_heads
from .training import (
    ExitDistillation,
    ExitsTrainer,
    GradientConflict,
    GradientConflictRecorder,
    RoutingSchedule,
    add_teacher_logits,
    gradient_conflict,
)

for _architecture in list(ARCHITECTURES.values()):
    register_architecture(_architecture)
ExitsMixin.before_upload = CascadeForSequenceClassification.before_upload = choose_card_to_upload
AutoConfig.register(CascadeConfig.model_type, CascadeConfig, exist_ok=True)
AutoModelForSequenceClassification.register(CascadeConfig, CascadeForSequenceClassification, exist_ok=True)
if is_peft_available():
    from .training import adapters

    adapters.register()


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AutoModelForSequenceClassificationWithExits",
    "CalibrationReport",
    "CascadeConfig",
    "CascadeForSequenceClassification",
    "ExitCalibrator",
    "ExitDistillation",
    "ExitReport",
    "ExitsTextClassificationPipeline",
    "ExitsTrainer",
    "GradientConflict",
    "GradientConflictRecorder",
    "Head",
    "RoutingSchedule",
    "SequenceClassifierWithExitsOutput",
    "add_teacher_logits",
    "calibrate_exits",
    "evaluate_exits",
    "export_onnx",
    "gradient_conflict",
    "mean_attention",
    "rank_heads",
    "register_architecture",
]
# Made when they are first asked for.
CLASSES = [name for architecture in ARCHITECTURES.values() for name in architecture.class_names]
