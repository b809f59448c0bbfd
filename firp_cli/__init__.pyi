from firp_cli.api.bench_run import bench as bench
from firp_cli.api.collect_run import collect as collect
from firp_cli.api.collect_run import write_prompts as write_prompts
from firp_cli.api.decoder import Decoder as Decoder
from firp_cli.api.decoder import load as load
from firp_cli.api.eval_run import evaluate as evaluate
from firp_cli.api.loading import LayerBackend as LayerBackend
from firp_cli.api.train_run import train as train
from firp_cli.api.tune_run import tune as tune
from firp_cli.api.write_report import write_report as write_report
from firp_cli.collecting.own_prompts import PromptSettings as PromptSettings
from firp_cli.config import Recipe as Recipe
from firp_cli.config import TeacherConfig as TeacherConfig
from firp_cli.decoding.engine import EngineOptions as EngineOptions
from firp_cli.errors import FirpError as FirpError
from firp_cli.evaluation.methods import BenchSettings as BenchSettings
from firp_cli.results import BenchReport as BenchReport
from firp_cli.results import EvalReport as EvalReport
from firp_cli.results import Generation as Generation
from firp_cli.tune_results import TuneReport as TuneReport
from firp_cli.tuning.calibration import TuneSettings as TuneSettings

__version__: str
__all__: list[str]
