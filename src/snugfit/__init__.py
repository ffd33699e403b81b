"""snugfit: quantize a language model to fit the GPU you have, in formats that stock engines run.

    import snugfit
    record = snugfit.quantize("org/model", "nvfp4", output_dir="OUT", dataset=["calibration.jsonl"])

Every verb of the command line is a function here, every option one of its parameters. Functions are silent unless they
are given `progress=snugfit.TerminalProgress()`; bad input raises `snugfit.UserError`. Nothing heavy is imported before
the first call: a name is looked up in its module when it is used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from snugfit.version import __version__

if TYPE_CHECKING:
    from snugfit.benchmarking.bench import bench, write_bench
    from snugfit.benchmarking.imported import import_bench
    from snugfit.benchmarking.plan import BenchOptions
    from snugfit.data.describe import describe_dataset
    from snugfit.errors import UserError
    from snugfit.evaluation.compare import compare, write_comparison
    from snugfit.evaluation.evaluate import evaluate, write_results
    from snugfit.evaluation.served import ServerOptions
    from snugfit.evaluation.tasks import TasksRun, run_tasks, write_tasks
    from snugfit.hosting.request import Measures, ServeOptions
    from snugfit.hosting.serve import serve
    from snugfit.inspection.doctor import doctor
    from snugfit.inspection.inspect import inspect
    from snugfit.inspection.repair import plan_repair, repair
    from snugfit.planning.fit import fit
    from snugfit.planning.make_plan import plan
    from snugfit.planning.published import diff_plans, read_recipe
    from snugfit.progress import Progress, TerminalProgress
    from snugfit.publishing.push import PushPlan, push
    from snugfit.publishing.report import make_report
    from snugfit.quantization.collect import collect_statistics
    from snugfit.quantization.compare_datasets import compare_datasets
    from snugfit.quantization.import_statistics import import_statistics
    from snugfit.quantization.prepared_run import PreparedRun
    from snugfit.quantization.quantize import plan_quantization, quantize
    from snugfit.quantization.run_time import RunTime, estimate_run_time
    from snugfit.recipes.recipe import LoadedRecipe, list_recipes, load_recipe
    from snugfit.records.bench import BenchRecord
    from snugfit.records.comparison import CompareRecord
    from snugfit.records.dataset import DatasetComparison, DatasetRecord
    from snugfit.records.doctor import DoctorRecord, Finding, RepairRecord
    from snugfit.records.evaluation import EvalRecord, TasksRecord
    from snugfit.records.fit import FitRecord
    from snugfit.records.inspection import Inspection
    from snugfit.records.plan import PlanDifferences, PlanRecord
    from snugfit.records.quantize import QuantizeRecord, TensorRecord
    from snugfit.records.report import ReportRecord
    from snugfit.records.serve import ServeRecord
    from snugfit.records.statistics_file import Statistics, load_statistics

__all__ = [
    "BenchOptions",
    "BenchRecord",
    "CompareRecord",
    "DatasetComparison",
    "DatasetRecord",
    "DoctorRecord",
    "EvalRecord",
    "Finding",
    "FitRecord",
    "Inspection",
    "LoadedRecipe",
    "Measures",
    "PlanDifferences",
    "PlanRecord",
    "PreparedRun",
    "Progress",
    "PushPlan",
    "QuantizeRecord",
    "RepairRecord",
    "ReportRecord",
    "RunTime",
    "ServeOptions",
    "ServeRecord",
    "ServerOptions",
    "Statistics",
    "TasksRecord",
    "TasksRun",
    "TensorRecord",
    "TerminalProgress",
    "UserError",
    "__version__",
    "bench",
    "collect_statistics",
    "compare",
    "compare_datasets",
    "describe_dataset",
    "diff_plans",
    "doctor",
    "estimate_run_time",
    "evaluate",
    "fit",
    "import_bench",
    "import_statistics",
    "inspect",
    "list_recipes",
    "load_recipe",
    "load_statistics",
    "make_report",
    "plan",
    "plan_quantization",
    "plan_repair",
    "push",
    "quantize",
    "read_recipe",
    "repair",
    "run_tasks",
    "serve",
    "write_bench",
    "write_comparison",
    "write_results",
    "write_tasks",
]

# module -> the public names that it defines; a test holds this equal to the imports above
_MODULES = {
    "benchmarking.bench": ("bench", "write_bench"),
    "benchmarking.imported": ("import_bench",),
    "benchmarking.plan": ("BenchOptions",),
    "data.describe": ("describe_dataset",),
    "errors": ("UserError",),
    "evaluation.compare": ("compare", "write_comparison"),
    "evaluation.evaluate": ("evaluate", "write_results"),
    "evaluation.served": ("ServerOptions",),
    "evaluation.tasks": ("TasksRun", "run_tasks", "write_tasks"),
    "hosting.request": ("Measures", "ServeOptions"),
    "hosting.serve": ("serve",),
    "inspection.doctor": ("doctor",),
    "inspection.inspect": ("inspect",),
    "inspection.repair": ("plan_repair", "repair"),
    "planning.fit": ("fit",),
    "planning.make_plan": ("plan",),
    "planning.published": ("diff_plans", "read_recipe"),
    "progress": ("Progress", "TerminalProgress"),
    "publishing.push": ("PushPlan", "push"),
    "publishing.report": ("make_report",),
    "quantization.collect": ("collect_statistics",),
    "quantization.import_statistics": ("import_statistics",),
    "quantization.compare_datasets": ("compare_datasets",),
    "quantization.prepared_run": ("PreparedRun",),
    "quantization.quantize": ("plan_quantization", "quantize"),
    "quantization.run_time": ("RunTime", "estimate_run_time"),
    "recipes.recipe": ("LoadedRecipe", "list_recipes", "load_recipe"),
    "records.bench": ("BenchRecord",),
    "records.comparison": ("CompareRecord",),
    "records.dataset": ("DatasetComparison", "DatasetRecord"),
    "records.doctor": ("DoctorRecord", "Finding", "RepairRecord"),
    "records.evaluation": ("EvalRecord", "TasksRecord"),
    "records.fit": ("FitRecord",),
    "records.inspection": ("Inspection",),
    "records.plan": ("PlanDifferences", "PlanRecord"),
    "records.quantize": ("QuantizeRecord", "TensorRecord"),
    "records.report": ("ReportRecord",),
    "records.serve": ("ServeRecord",),
    "records.statistics_file": ("Statistics", "load_statistics"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'snugfit' has no attribute {name!r}")
    value = getattr(import_module(f"snugfit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
