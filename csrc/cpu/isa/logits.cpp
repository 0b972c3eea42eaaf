#include "rewardops/cpu/logits.h"
