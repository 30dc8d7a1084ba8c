"""Training objectives: costs, losses, and their choice by method."""
