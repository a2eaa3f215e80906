"Bad values on the command line, made from the options of every command"
import argparse

from fastkdtf.cli import _parser

recipe = 'wang2020/T1/ResNet20/LsrKD'
values = ['', 'x', '-1', 'nan', '1e999', '9'*30, '[]', 'a?b/../x', 'é\u2028', '--', '=', '0x10']

def bases(tmp):
    "A command of each kind that works, up to its training"
    return dict(compare=['compare', '--data', 'digits', '--train-subset', '40', '--bs', '20', '--epochs', '1', '--seeds', '1', '--device', 'cpu', '--arch', 'resnet8', '--methods', 'LsrKD', '--out', str(tmp/'compare')],
                run=['run', recipe, '--data', 'digits', '--epochs', '1', '--seeds', '1', '--scale', '.01', '--device', 'cpu', '--out', str(tmp/'run')],
                sweep=['sweep', recipe, '--data', 'digits', '--grid', 'alpha=.1,.2', '--epochs', '1', '--device', 'cpu', '--out', str(tmp/'sweep')],
                tune=['tune', 'LsrKD', '--data', 'digits', '--epochs', '1', '--device', 'cpu', '--out', str(tmp/'tune'), '--grid', 'alpha=.1,.2'],
                report=['report', str(tmp/'runs'), '--out', str(tmp/'report.html')], recipes=['recipes'], describe=['describe', 'LsrKD'], bench=['bench', '--rounds', '1', '--samples', '2', '--bs', '2', '--size', '8', '--arch', 'resnet8', '--losses-only'])

def options(command):
    "The options of a command that take a value"
    sub = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return [action for action in sub.choices[command]._actions if action.option_strings and action.nargs in (None, '?', '+', '*') and action.dest != 'help']

listed = {   # what was seen to end in a traceback, and its kind
    'describe': [['LsrKD', 'tau=1e308'], ['LsrKD', 'alpha=[1]'], ['LsrKD', 'alpha={}'], ['LsrKD', 'gamma=(1,2)'], ['LsrKD', 'tau=None'], ['LsrKD', '=1'], ['LsrKD', 'a b=1'],
                 ['LsrKD', 'alpha=.1', 'alpha=.2', 'nosuch=3'], ['LSR', 'alpha=1e400'], ['TfKDReg', 'variant=[]'], ['TfKDReg', 'scale=[]'], ['TfKDReg', 'correct_prob=1e-400'], ['MemoryReplay', 'n_copies=9'*12], ['SelfGuidance', 'lam=[[]]'],
                 ['LsrKD', '--classes', '9'*25], ['LsrKD', 'alpha=' + '('*500], ['LsrKD', 'alpha=1/0'], ['LsrKD', 'name=3'], ['KD', 'teacher=x', 'alpha=x'], ['Nonsense'], [''], ['LsrKD', 'tau=9'*400], ['SelfGuidance', 'detach=x']],
    'sweep': [[recipe, '--grid', 'alpha=.1:.5:foo', '--tpe', '2'], [recipe, '--grid', 'alpha=.5:.1', '--tpe', '2'], [recipe, '--grid', 'alpha=[1]'], [recipe, '--grid', 'alpha=x'], [recipe, '--grid', 'nosuch=1'], [recipe, '--grid', 'alpha=.1:.2:.3:.4', '--tpe', '2'],
              [recipe, '--grid', 'alpha=,'], [recipe, '--grid', 'alpha'], [recipe, '--grid', 'alpha=nan'], [recipe, '--grid', 'alpha={}', '--data', 'digits'], ['nosuch/recipe'], [recipe, '--grid', 'alpha=0:1:log', '--tpe', '2'], [recipe, '--tpe', '0']],
    'compare': [['--arch', 'timm/vit_tiny_patch16_224'], ['--device', 'meta'], ['--lr', '1e300'], ['--arch', 'timm/'], ['--arch', 'torchvision/resnet18x'], ['--data', '/dev/null'], ['--data', '.'], ['--methods', 'KD'], ['--methods', 'LsrKD:alpha=2'],
                ['--methods', 'LsrKD:alpha'], ['--methods', 'nowhere.py:Mine'], ['--seeds', '2000000'], ['--out', ''], ['--train-subset', '9'*15], ['--data', 'x\0y'], ['--arch', 'x'*5000]],
    'run': [['nosuch'], ['*/nosuch/*'], [recipe, '--scale', '2'], [recipe, '--gpus', '1'], [recipe, '--data', '/dev/null'], [recipe, '--device', 'meta'], ['']],
    'report': [['/dev/null'], ['']], 'tune': [['LsrKD', '--grid', 'alpha=2,3'], ['LsrKD', '--grid', 'nosuch=1'], ['Nonsense'], ['LsrKD', '--grid', 'alpha=.1:.5:foo', '--tpe', '2']], 'recipes': [['nosuch'], ['--paper', 'x'], ['--table', '*']], 'bench': [['--samples', '9'*12], ['--classes', '9'*12]]}


def commands(tmp):
    "Yield command lines that cannot be right"
    base = bases(tmp)
    for command in base:
        for action in options(command):
            name = action.option_strings[-1]
            if command == 'bench' and name in ('--arch', '--bs', '--size'): continue   # of steps, which are left out here
            yield from ([*base[command], name, value] for value in values if name != '--out' or not value)   # any name is good for a folder
        for args in listed.get(command, ()): yield [*base[command], *args] if command in ('compare', 'report') else [command, *args]
